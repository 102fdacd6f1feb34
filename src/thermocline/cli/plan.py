"""Verbs that plan and diagnose: bytes, seconds, money, and what is wrong."""

from __future__ import annotations
