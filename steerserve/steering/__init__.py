"""From a steering spec and policies to a plan: plain arrays for one loaded model."""
