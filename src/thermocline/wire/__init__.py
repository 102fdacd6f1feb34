"""Bytes from outside: HTTP and the OpenAI API, read strictly and bounded everywhere."""
