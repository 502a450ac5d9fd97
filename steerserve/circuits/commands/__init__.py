"""One module a command of `steerserve analyse`."""
