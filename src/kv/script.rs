//! The atomic scripts: each compares the marker first, so that a writer that is not where it thinks
//! (a zombie, a stale replica, FLUSHALL) changes nothing and learns where the view is.

use redis::{RedisError, Script, ScriptInvocation};

use super::keys::Keys;
use crate::platform::redis::Redis;

/// KEYS: view, ends, then one per idempotent record. ARGV: expected marker, new marker, the second
/// of now plus a day, then groups: `H` count field entry…, `Z` count score member…, or
/// `C` field kind version rest id-key-index, a record whose version decides.
/// Returns what the marker was, and 1 when the batch was applied.
const APPLY: &str = r"
local marker = redis.call('HGET', KEYS[1], '') or ''
if marker ~= ARGV[1] then return {marker, 0} end
local at = 3
while ARGV[at] do
  local kind = ARGV[at]
  if kind == 'C' then
    local field, state, version, rest, id = ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4], tonumber(ARGV[at + 5])
    if id > 0 then
      version = redis.call('SET', KEYS[id], version, 'NX', 'GET', 'EX', 86400) or version
    end
    local present = redis.call('HGET', KEYS[1], field)
    local newest = present and tonumber(string.match(present, '^%a(%d+):')) or -1
    if tonumber(version) >= newest then
      redis.call('HSET', KEYS[1], field, state .. version .. ':' .. rest)
    end
    at = at + 6
  else
    local last = at + 1 + tonumber(ARGV[at + 1])
    if kind == 'H' then
      redis.call('HSET', KEYS[1], unpack(ARGV, at + 2, last))
    else
      redis.call('ZADD', KEYS[2], unpack(ARGV, at + 2, last))
    end
    at = last + 1
  end
end
redis.call('HSET', KEYS[1], '', ARGV[2])
return {marker, 1}
";

/// KEYS: view, ends. ARGV: expected marker, new marker, 1 to drop the view first.
const MARK: &str = r"
local marker = redis.call('HGET', KEYS[1], '') or ''
if marker ~= ARGV[1] then return {marker, 0} end
if ARGV[3] == '1' then redis.call('UNLINK', KEYS[1], KEYS[2]) end
redis.call('HSET', KEYS[1], '', ARGV[2])
return {marker, 1}
";

/// KEYS: view, ends. ARGV: now in ms, when to look again in ms, how many.
/// Forgets deleted keys whose day is over; returns field and entry of values that have expired.
const DUE: &str = r"
local expired = {}
for _, field in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', ARGV[1], 'LIMIT', 0, ARGV[3])) do
  local entry = redis.call('HGET', KEYS[1], field)
  local kind = entry and string.sub(entry, 1, 1)
  local ends = kind == 'e' and tonumber(string.match(entry, '^e%d+:(%d+):'))
  if kind == 'd' then
    redis.call('HDEL', KEYS[1], field)
    redis.call('ZREM', KEYS[2], field)
  elseif not ends then
    redis.call('ZREM', KEYS[2], field)
  elseif ends > tonumber(ARGV[1]) then
    redis.call('ZADD', KEYS[2], ends, field)
  else
    redis.call('ZADD', KEYS[2], ARGV[2], field)
    expired[#expired + 1] = field
    expired[#expired + 1] = entry
  end
end
return expired
";

/// Arguments of one `HSET` or `ZADD`; Lua's stack bounds what `unpack` takes.
const MAX_GROUP: usize = 2_000;

/// The compiled scripts.
pub struct Scripts {
    apply: Script,
    mark: Script,
    due: Script,
}

impl Default for Scripts {
    fn default() -> Self {
        Self { apply: Script::new(APPLY), mark: Script::new(MARK), due: Script::new(DUE) }
    }
}

/// What a script found: the marker before, and whether it was the expected one.
pub type Found = (Vec<u8>, bool);

impl Scripts {
    pub async fn apply(
        &self,
        redis: &mut Redis,
        keys: &Keys,
        expected: &str,
        new: &str,
        writes: Writes,
    ) -> Result<Found, RedisError> {
        let mut call = self.apply.key(&keys.view);
        call.key(&keys.ends);
        for id in &writes.id_keys {
            call.key(id);
        }
        call.arg(expected).arg(new);
        writes.add_to(&mut call);
        call.invoke_async(redis).await
    }

    pub async fn mark(
        &self,
        redis: &mut Redis,
        keys: &Keys,
        expected: &str,
        new: &str,
        drop_view: bool,
    ) -> Result<Found, RedisError> {
        let mut call = self.mark.key(&keys.view);
        call.key(&keys.ends).arg(expected).arg(new).arg(u8::from(drop_view));
        call.invoke_async(redis).await
    }

    /// Expired fields with their entries, alternating.
    pub async fn due(
        &self,
        redis: &mut Redis,
        keys: &Keys,
        now_ms: i64,
        again_ms: i64,
        limit: usize,
    ) -> Result<Vec<Vec<u8>>, RedisError> {
        let mut call = self.due.key(&keys.view);
        call.key(&keys.ends).arg(now_ms).arg(again_ms).arg(limit);
        call.invoke_async(redis).await
    }
}

/// What a batch changes, in order.
#[derive(Default)]
pub struct Writes {
    groups: Vec<Group>,
    id_keys: Vec<String>,
}

enum Group {
    /// Fields and entries, alternating.
    Set(Vec<Vec<u8>>),
    /// Scores and members, alternating.
    Ends(Vec<Vec<u8>>),
    Conditional {
        field: Vec<u8>,
        kind: u8,
        version: i64,
        rest: Vec<u8>,
        id: usize,
    },
}

impl Writes {
    /// Sets an entry that is newer than whatever is there.
    pub fn set(&mut self, field: &[u8], entry: Vec<u8>) {
        match self.groups.iter_mut().rev().find(|group| !matches!(group, Group::Ends(_))) {
            Some(Group::Set(pairs)) if pairs.len() < MAX_GROUP => pairs.extend([field.to_vec(), entry]),
            _ => self.groups.push(Group::Set(vec![field.to_vec(), entry])),
        }
    }

    /// Notes when an entry ends.
    pub fn ends(&mut self, field: &[u8], at_ms: i64) {
        let pair = [at_ms.to_string().into_bytes(), field.to_vec()];
        match self.groups.last_mut() {
            Some(Group::Ends(pairs)) if pairs.len() < MAX_GROUP => pairs.extend(pair),
            _ => self.groups.push(Group::Ends(pair.to_vec())),
        }
    }

    /// Sets an entry unless a newer version is there. `id_key` remembers an idempotent write.
    pub fn set_unless_newer(&mut self, field: &[u8], entry: &[u8], version: i64, id_key: Option<String>) {
        let rest = entry.iter().position(|&byte| byte == b':').map_or(&[][..], |colon| &entry[colon + 1..]);
        let id = id_key.map_or(0, |key| {
            self.id_keys.push(key);
            // After the view and the ends, counted from one.
            self.id_keys.len() + 2
        });
        let kind = entry.first().copied().unwrap_or(b'd');
        self.groups.push(Group::Conditional { field: field.to_vec(), kind, version, rest: rest.to_vec(), id });
    }

    fn add_to(self, call: &mut ScriptInvocation<'_>) {
        for group in self.groups {
            match group {
                Group::Set(pairs) => add_group(call, "H", pairs),
                Group::Ends(pairs) => add_group(call, "Z", pairs),
                Group::Conditional { field, kind, version, rest, id } => {
                    call.arg("C").arg(field).arg(&[kind][..]).arg(version).arg(rest).arg(id);
                }
            }
        }
    }
}

fn add_group(call: &mut ScriptInvocation<'_>, kind: &str, items: Vec<Vec<u8>>) {
    call.arg(kind).arg(items.len());
    for item in items {
        call.arg(item);
    }
}
