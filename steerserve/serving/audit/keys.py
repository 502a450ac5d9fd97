"""The keys of the log: one that only the server has, and a pair of which the public half may go anywhere."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from steerserve.errors import AssetError

MAC_KEY, SIGNING_KEY, PUBLIC_KEY = "audit.key", "heads.key", "heads.pub"
_KEY_BYTES = 32


class AuditKey:
    """The secret from which the key of the MACs and the key of the texts' hashes are derived.

    Attributes:
        id: names the key and tells nothing about it.
    """

    def __init__(self, secret: bytes) -> None:
        self._line, self._text = (_derived(secret, purpose) for purpose in ("line", "text"))
        self.id = _derived(secret, "id").hex()[:16]

    @classmethod
    def load(cls, path: Path) -> AuditKey:
        """Read the file that ``create_keys`` wrote.

        Raises:
            AssetError: it cannot be read, others may read it, or it holds no key.
        """
        try:
            secret = bytes.fromhex(_read_private(path).decode().strip())
        except ValueError:
            secret = b""
        if len(secret) != _KEY_BYTES:
            raise AssetError(
                f"{path}: expected {_KEY_BYTES} bytes in hex, as `steerserve audit key create` writes them"
            )
        return cls(secret)

    def mac(self, content: bytes) -> str:
        """HMAC-SHA256 of a line's content, in hex."""
        return hmac.digest(self._line, content, "sha256").hex()

    def text_hash(self) -> hmac.HMAC:
        """HMAC-SHA256 to feed with a text: without the key, not even a short one can be found by trying."""
        return hmac.new(self._text, digestmod="sha256")


def create_keys(directory: Path) -> tuple[Path, Path, Path]:
    """Write new keys: of the MACs, for signing heads, and the public half; none of them may be there yet.

    Raises:
        AssetError: a file exists, or cannot be written.
    """
    signing = Ed25519PrivateKey.generate()
    private = signing.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = signing.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    contents = ((MAC_KEY, secrets.token_hex(_KEY_BYTES).encode() + b"\n", 0o600), (SIGNING_KEY, private, 0o600),
                (PUBLIC_KEY, public, 0o644))  # fmt: skip
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, _, _ in contents:
            if (directory / name).exists():
                raise AssetError(f"{directory / name} exists; a log whose key is overwritten can not be verified")
        for name, data, mode in contents:
            with os.fdopen(os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
    except OSError as error:
        raise AssetError(f"{directory}: {error.strerror}") from error
    return directory / MAC_KEY, directory / SIGNING_KEY, directory / PUBLIC_KEY


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """The private half.

    Raises:
        AssetError: as ``AuditKey.load``.
    """
    data = _read_private(path)
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise AssetError(f"{path}: expected an Ed25519 private key in PEM, without a password")
    return key


def load_public_key(path: Path) -> Ed25519PublicKey:
    """The public half.

    Raises:
        AssetError: the file cannot be read, or holds no key.
    """
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise AssetError(f"{path}: {error.strerror}") from error
    except (ValueError, UnsupportedAlgorithm):
        raise AssetError(f"{path}: expected an Ed25519 public key in PEM") from None
    if not isinstance(key, Ed25519PublicKey):
        raise AssetError(f"{path}: expected an Ed25519 public key in PEM")
    return key


def is_signed(key: Ed25519PublicKey, signature: bytes, content: bytes) -> bool:
    """``signature`` is that of ``content``."""
    try:
        key.verify(signature, content)
    except InvalidSignature:
        return False
    return True


def _derived(secret: bytes, purpose: str) -> bytes:
    return hmac.digest(secret, f"steerserve audit {purpose}".encode(), hashlib.sha256)


def _read_private(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise AssetError(f"{path}: mode {mode:04o} lets others at the key, expected 0600")
            return file.read(1 << 16)
    except OSError as error:
        raise AssetError(f"{path}: {error.strerror}") from error
