"""The lab's commands, one module each; ``steerserve.lab.cli`` puts them together."""
