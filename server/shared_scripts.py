"""What Redis keeps of runs and workers: the names of its keys, and the scripts that change more than one thing at once.

Whoever may write a run's events is in its hash (``worker``): each write checks that in the same step, so a worker that
was away too long (stopped, cut off) and is taken for dead can write nothing after the end that another wrote for it.
"""

from __future__ import annotations

from hashlib import sha1

WORKERS = "lumos:workers"
"""Hash: each worker's heartbeat, a number that grows."""

GRAVE_MILLISECONDS = 24 * 3600 * 1000
"""How long it is remembered that a worker was given up; it finds out when it comes back."""


def events_key(run_id: str) -> str:
    """Stream: a run's events; ids are ``{seq}-0``, field ``e`` is the event's JSON."""
    return f"lumos:{{{run_id}}}:events"


def run_key(run_id: str) -> str:
    """Hash: whose run it is, which worker's, its status."""
    return f"lumos:{{{run_id}}}:run"


def runs_key(worker: str) -> str:
    """Set: the runs that a worker has under way."""
    return f"lumos:worker:{{{worker}}}:runs"


def inbox_key(worker: str) -> str:
    """Stream: what other workers ask of a worker."""
    return f"lumos:worker:{{{worker}}}:inbox"


def grave_key(worker: str) -> str:
    """Present for a day after a worker was given up."""
    return f"lumos:worker:{{{worker}}}:grave"


class Script:
    """A Lua script, called by its digest."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._digest = sha1(text.encode(), usedforsecurity=False).hexdigest()

    def call(self, keys: list[str], *arguments: str | bytes | int) -> list[str | bytes | int]:
        """The command that runs it."""
        return ["EVALSHA", self._digest, len(keys), *keys, *arguments]


OPEN = Script("""
-- keys: run, the worker's runs; arguments: worker, run id, milliseconds to live, fields and values
-- 1: the run is the worker's; 0: it is another's by now, or forgotten
local worker = redis.call('HGET', KEYS[1], 'worker')
if worker then return worker == ARGV[1] and 1 or 0 end
redis.call('HSET', KEYS[1], 'worker', ARGV[1], 'status', 'running', unpack(ARGV, 4))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('SADD', KEYS[2], ARGV[2])
return 1
""")

APPEND = Script("""
-- keys: events, run, the worker's runs; arguments: worker, run id, milliseconds to live, terminal number or 0,
-- milliseconds to live after it, fields and values of the end as JSON, then numbers and events
-- the number of the newest event there; -1: Redis does not know the run; -2: the run is not the worker's any more
local worker = redis.call('HGET', KEYS[2], 'worker')
if not worker then return -1 end
if worker ~= ARGV[1] then return -2 end
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
local last = newest and tonumber(string.match(newest[1], '^%d+')) or 0
for i = 7, #ARGV, 2 do
  local seq = tonumber(ARGV[i])
  if seq == last + 1 then
    redis.call('XADD', KEYS[1], ARGV[i] .. '-0', 'e', ARGV[i + 1])
    last = seq
  end
end
local live = ARGV[3]
if ARGV[4] ~= '0' and last == tonumber(ARGV[4]) then
  live = ARGV[5]
  redis.call('HSET', KEYS[2], unpack(cjson.decode(ARGV[6])))
  redis.call('SREM', KEYS[3], ARGV[2])
end
redis.call('PEXPIRE', KEYS[1], live)
redis.call('PEXPIRE', KEYS[2], live)
return last
""")

BEAT = Script("""
-- keys: workers, grave, inbox; arguments: worker, milliseconds that the inbox lives
-- -1: the worker was given up
if redis.call('EXISTS', KEYS[2]) == 1 then return -1 end
if redis.call('EXISTS', KEYS[3]) == 0 then redis.call('XADD', KEYS[3], '*', 'm', '') end
redis.call('PEXPIRE', KEYS[3], ARGV[2])
return redis.call('HINCRBY', KEYS[1], ARGV[1], 1)
""")

BURY = Script("""
-- keys: workers, grave; arguments: worker, the heartbeat that was seen for too long, milliseconds
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('SET', KEYS[2], '1', 'PX', ARGV[3])
return 1
""")

CLAIM = Script("""
-- keys: run, the dead worker's runs, the heir's runs; arguments: dead worker, heir, run id
-- 1: the heir is to end the run; 0: nobody is
redis.call('SREM', KEYS[2], ARGV[3])
local worker, status = unpack(redis.call('HMGET', KEYS[1], 'worker', 'status'))
if worker ~= ARGV[1] or status ~= 'running' then return 0 end
redis.call('HSET', KEYS[1], 'worker', ARGV[2])
redis.call('SADD', KEYS[3], ARGV[3])
return 1
""")

END_LOST = Script("""
-- keys: events, run, the heir's runs; arguments: heir, run id, milliseconds to live after it, fields and values of the
-- end as JSON, then numbers and events: those that are missing here, the end last
redis.call('SREM', KEYS[3], ARGV[2])
local worker, status = unpack(redis.call('HMGET', KEYS[2], 'worker', 'status'))
if worker ~= ARGV[1] or status ~= 'running' then return 0 end
for i = 5, #ARGV, 2 do
  redis.call('XADD', KEYS[1], ARGV[i] .. '-0', 'e', ARGV[i + 1])
end
redis.call('HSET', KEYS[2], unpack(cjson.decode(ARGV[4])))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return 1
""")

LEAVE = Script("""
-- keys: workers, the worker's runs, inbox; arguments: worker
-- a worker that leaves runs behind stays listed: another one ends them
if redis.call('SCARD', KEYS[2]) > 0 then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('DEL', KEYS[3])
return 1
""")

FORGET = Script("""
-- keys: events, run; arguments: milliseconds for who still reads the end, milliseconds to remember that it was there,
-- fields and values of the run's end as JSON, where it is known
-- how it ended is remembered; one that was under way had been stopped before
if redis.call('EXISTS', KEYS[2]) == 0 then return 0 end
local ending = cjson.decode(ARGV[3])
local status = redis.call('HGET', KEYS[2], 'status')
if status ~= 'forgotten' then
  if #ending > 0 then redis.call('HSET', KEYS[2], unpack(ending)) end
  status = redis.call('HGET', KEYS[2], 'status')
  redis.call('HSET', KEYS[2], 'ended', status == 'running' and 'stop' or status)
end
redis.call('HSET', KEYS[2], 'worker', '', 'status', 'forgotten')
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return 1
""")

SCRIPTS = (OPEN, APPEND, BEAT, BURY, CLAIM, END_LOST, LEAVE, FORGET)
