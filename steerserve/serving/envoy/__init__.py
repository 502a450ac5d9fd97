"""Envoy external processing: checks OpenAI-style traffic of another model while a proxy carries it."""
