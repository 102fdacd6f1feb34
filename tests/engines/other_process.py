"""Answers every n-th of the 24 prompts, under settings given as JSON, and prints what came."""

from __future__ import annotations

import json
import sys

from tests.engines.eager import eager_store
from tests.engines.prompts import NEW_TOKENS, prompts
from thermocline.engines.models import load_model
from thermocline.engines.transformers import Engine
from thermocline.settings import Settings

store = eager_store(Settings(memory_bytes=256 << 20, disk_bytes=256 << 20, **json.loads(sys.argv[1])))
engine = Engine(load_model("tiny", threads=1), store)
results = [engine.generate(prompt, NEW_TOKENS) for prompt in prompts()[int(sys.argv[2]) :: int(sys.argv[3])]]
engine.close()
store.close()
tiers = [r.receipt.by_tier if r.receipt else {} for r in results]
answers = [{"tokens": r.tokens, "cached_tokens": r.cached_tokens} for r in results]
sys.stdout.write(json.dumps([answer | {"by_tier": tier} for answer, tier in zip(answers, tiers, strict=True)]))
