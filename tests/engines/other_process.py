"""Answers the 24 prompts from a disk that another process wrote, and prints what came."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.engines.eager import eager_store
from tests.engines.prompts import NEW_TOKENS, prompts
from thermocline.engines.models import load_model
from thermocline.engines.transformers import Engine
from thermocline.settings import Settings

store = eager_store(Settings(memory_bytes=256 << 20, disk_bytes=256 << 20, disk_path=Path(sys.argv[1])))
engine = Engine(load_model("tiny", threads=1), store)
results = [engine.generate(prompt, NEW_TOKENS) for prompt in prompts()]
engine.close()
store.close()
sys.stdout.write(json.dumps([{"tokens": r.tokens, "cached_tokens": r.cached_tokens} for r in results]))
