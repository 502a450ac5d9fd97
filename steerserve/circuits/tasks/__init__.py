"""Built-in behaviours, each as pairs of prompts that differ in its cause."""
