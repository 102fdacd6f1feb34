"""What the server does for the Redis tier in one step: account for values, make room, forget, let live on.

Per namespace a sorted set names every value, ordered by when it expires, the deeper ones of a path a little sooner, so
that they go before their beginnings, also where a path is written in several parts. A hash says how large the values
of a layout are, and a counter what all of them take. Only these scripts change them, and the server runs one script at
a time: the cap holds however many engines write. What the server evicted by itself counts until it would have expired.
Should it evict these three keys, which every write uses, the sum begins anew, and values that nobody counts expire in
their time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import LayoutId
from thermocline.wire.resp import encode

Name = tuple[LayoutId, BlockKey]
"""What names a block. Its value's key in Redis is the namespace, a colon, and these 64 bytes."""

_BEGIN = b"""
local index, sizes, used = KEYS[1], KEYS[2], KEYS[3]
local prefix, cap, ttl = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local known, gone = {}, 0
local step = ttl / 100000
local function size(name)
  local layout = string.sub(name, 1, 32)
  if not known[layout] then known[layout] = tonumber(redis.call('HGET', sizes, layout) or '0') end
  return known[layout] > 0 and known[layout] or redis.call('STRLEN', prefix .. name)
end
local held = tonumber(redis.call('GET', used) or '-1')
if held < 0 or redis.call('EXISTS', index) == 0 then
  held = 0
  for _, name in ipairs(redis.call('ZRANGE', index, 0, -1)) do held = held + size(name) end
end
local function drop(name)
  gone = gone + redis.call('EXISTS', prefix .. name)
  if redis.call('ZREM', index, name) == 1 then held = held - size(name) end
  redis.call('UNLINK', prefix .. name)
end
"""
_EXPIRE = b"""
for _, name in ipairs(redis.call('ZRANGEBYSCORE', index, '-inf', now, 'LIMIT', 0, 256)) do drop(name) end
"""
_RESERVE = b"""
redis.call('HSET', sizes, ARGV[4], ARGV[5])
known[ARGV[4]] = tonumber(ARGV[5])
local mine, at = {}, 0
for i = 6, #ARGV, 2 do
  mine[ARGV[i]] = true
  if redis.call('ZADD', index, now + ttl - step * ARGV[i + 1], ARGV[i]) == 1 then held = held + size(ARGV[i]) end
end
while held > cap do
  local name = redis.call('ZRANGE', index, at, at)[1]
  if not name then break end
  if mine[name] then at = at + 1 else drop(name) end
end
"""
_FORGET = b"""
for i = 4, #ARGV do drop(ARGV[i]) end
"""
_TOUCH = b"""
for i = 4, #ARGV do
  if redis.call('ZSCORE', index, ARGV[i]) and redis.call('PEXPIRE', prefix .. ARGV[i], ttl) == 1 then
    redis.call('ZADD', index, now + ttl - step * (i - 3), ARGV[i])
  end
end
"""
_END = b"""
redis.call('SET', used, string.format('%.0f', held))
for _, key in ipairs(KEYS) do
  if redis.call('PTTL', key) < ttl + 3600000 then redis.call('PEXPIRE', key, ttl + 3600000) end
end
return {redis.call('ZCARD', index), held, gone}
"""
RESERVE = _BEGIN + _EXPIRE + _RESERVE + _END
FORGET = _BEGIN + _FORGET + _END
TOUCH = _BEGIN + _TOUCH + _END
NUMBERS = 3
"""Each answers with the values that are held now, their bytes, and how many values it deleted."""


@dataclass(frozen=True, slots=True)
class Space:
    """One namespace of a server: all keys in it begin with its name, and its values take `capacity_bytes` at most.

    A value that nobody used for `ttl_seconds` expires. `depth_max` and `gain_min` are those of `SharedTier`.
    """

    namespace: bytes
    capacity_bytes: int
    ttl_seconds: float
    depth_max: int | None = None
    gain_min: float = 0.0
    ttl_text: bytes = field(init=False)
    _first: tuple[bytes, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Make what every command has in common."""
        ttl = b"%d" % max(1, round(self.ttl_seconds * 1000))
        books = (self.namespace + end for end in (b":index", b":sizes", b":used"))
        object.__setattr__(self, "ttl_text", ttl)
        object.__setattr__(self, "_first", (b"3", *books, self.prefix, b"%d" % self.capacity_bytes, ttl))

    @property
    def prefix(self) -> bytes:
        """What every value's key begins with."""
        return self.namespace + b":"

    def value(self, layout: LayoutId, key: BlockKey) -> bytes:
        """The key of a block's value."""
        return b"%b:%b%b" % (self.namespace, layout, key)

    def reserve(self, layout: LayoutId, size: int, blocks: Sequence[tuple[BlockKey, int]]) -> bytes:
        """The command that accounts for blocks (key and depth) of `size` bytes, and evicts what is over the cap."""
        named = (part for key, depth in blocks for part in (layout + key, b"%d" % depth))
        return encode(b"EVAL", RESERVE, *self._first, layout, b"%d" % size, *named)

    def forget(self, names: Sequence[Name]) -> bytes:
        """The command that deletes values."""
        return encode(b"EVAL", FORGET, *self._first, *(layout + key for layout, key in names))

    def touch(self, names: Sequence[Name]) -> bytes:
        """The command that gives values their whole time to live again, the first of them the longest."""
        return encode(b"EVAL", TOUCH, *self._first, *(layout + key for layout, key in names))
