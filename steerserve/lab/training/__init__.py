"""Training of SAEs and transcoders on harvested activations.

``settings`` says what a run is; ``objective`` is what all objectives share, ``relu``, ``topk``, ``jumprelu`` and
``gated`` are the objectives; ``trainer`` takes steps, ``run`` takes all of them and survives interruptions with the
help of ``checkpoint``; ``metrics`` keeps what was measured on the way; ``sweep`` makes many runs and compares them.
"""
