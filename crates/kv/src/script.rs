//! Atomic Redis scripts of the view. Each compares the marker first: if it differs from the
//! writer's expected value (another owner, a stale replica, FLUSHALL), the script changes nothing
//! and returns the current marker.

use postrider_redis::Redis;
use redis::{RedisError, Script, ScriptInvocation};

use super::keys::Keys;

/// Applies a batch.
///
/// - KEYS: view, ends, id counts, then one per idempotent record.
/// - ARGV: expected marker, new marker, seconds for which an id is stored, then groups: `H` count
///   field entry…, `Z` count score member…, or `C` field kind version rest id-key-index appended
///   ends remember for a record that is applied by version.
/// - Returns the previous marker, and 1 if the batch was applied.
///
/// A write whose id was seen in an earlier record, at most a day before it by the log's timestamps,
/// is a duplicate. It changes nothing unless its entry is missing. See
/// docs/adr/0001-versions-and-restating.md. The id counts track how many ids
/// expire in which hour; ids are separate keys, which Redis expires by itself.
const APPLY: &str = r"
local marker = redis.call('HGET', KEYS[1], '') or ''
if marker ~= ARGV[1] then return {marker, 0} end
local seconds = tonumber(redis.call('TIME')[1])
local hour, counts = math.floor((seconds + ARGV[3]) / 3600), {}
local at = 4
while ARGV[at] do
  local kind = ARGV[at]
  if kind == 'C' then
    local field, version, id, appended = ARGV[at + 1], ARGV[at + 3], tonumber(ARGV[at + 5]), ARGV[at + 6]
    local present = redis.call('HGET', KEYS[1], field)
    local newest = present and tonumber(string.match(present, '^%a(%d+):')) or -1
    local applies = tonumber(version) >= newest
    if id > 0 then
      local memory = redis.call('GET', KEYS[id])
      local first, seen = string.match(memory or '', '^(%d+):(%d+)$')
      local double = first and tonumber(first) < tonumber(version) and tonumber(appended) - tonumber(seen) <= 86400
      applies = not double or not present
      if ARGV[at + 8] == '1' then
        if memory then
          local until_hour = math.floor((seconds + redis.call('TTL', KEYS[id])) / 3600)
          counts[until_hour] = (counts[until_hour] or 0) - 1
        end
        counts[hour] = (counts[hour] or 0) + 1
        redis.call('SET', KEYS[id], (applies and version or first) .. ':' .. appended, 'EX', ARGV[3])
      end
    end
    if applies then
      redis.call('HSET', KEYS[1], field, ARGV[at + 2] .. version .. ':' .. ARGV[at + 4])
      if ARGV[at + 7] ~= '' then redis.call('ZADD', KEYS[2], ARGV[at + 7], field) end
    end
    at = at + 9
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
for until_hour, count in pairs(counts) do
  if count ~= 0 then redis.call('HINCRBY', KEYS[3], string.format('%d', until_hour), count) end
end
if counts[hour] then
  redis.call('EXPIRE', KEYS[3], ARGV[3] + 3600)
  if redis.call('HLEN', KEYS[3]) > 48 then
    for _, field in ipairs(redis.call('HKEYS', KEYS[3])) do
      if tonumber(field) < math.floor(seconds / 3600) then redis.call('HDEL', KEYS[3], field) end
    end
  end
end
redis.call('HSET', KEYS[1], '', ARGV[2])
return {marker, 1}
";

/// Sets the marker. KEYS: view, ends. ARGV: expected marker, new marker, 1 to drop the view first.
const MARK: &str = r"
local marker = redis.call('HGET', KEYS[1], '') or ''
if marker ~= ARGV[1] then return {marker, 0} end
if ARGV[3] == '1' then redis.call('UNLINK', KEYS[1], KEYS[2]) end
redis.call('HSET', KEYS[1], '', ARGV[2])
return {marker, 1}
";

/// Finds due keys. KEYS: view, ends. ARGV: now in ms, time of the next check in ms, limit, expected
/// marker. Drops deleted keys past their retention. Returns the number of due keys, and the fields
/// of expired values. Entries of an unknown kind stay and are checked again later.
const DUE: &str = r"
local expired = {}
if redis.call('HGET', KEYS[1], '') ~= ARGV[4] then return {0, expired} end
local fields = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', ARGV[1], 'LIMIT', 0, ARGV[3])
for _, field in ipairs(fields) do
  local entry = redis.call('HGET', KEYS[1], field)
  local kind = entry and string.sub(entry, 1, 1)
  local ends = kind == 'e' and tonumber(string.match(entry, '^e%d+:(-?%d+):'))
  if kind == 'd' then
    redis.call('HDEL', KEYS[1], field)
    redis.call('ZREM', KEYS[2], field)
  elseif kind and kind ~= 'v' and not ends then
    redis.call('ZADD', KEYS[2], ARGV[2], field)
  elseif not ends then
    redis.call('ZREM', KEYS[2], field)
  elseif ends > tonumber(ARGV[1]) then
    redis.call('ZADD', KEYS[2], ends, field)
  else
    redis.call('ZADD', KEYS[2], ARGV[2], field)
    expired[#expired + 1] = field
  end
end
return {#fields, expired}
";

/// Time for which ids and deleted keys are stored, in seconds: a day within which a duplicate may
/// arrive, and half a day for the projection to read it.
pub const REMEMBER_S: i64 = 36 * 3_600;

/// Age from which a write's id is not stored when the write is read, in seconds: a day within which
/// a duplicate may arrive, and a day for which the projection may be down. Duplicates of older
/// writes that a rebuild reads have been restated already, and their ids would take as much memory
/// as the values.
pub const FORGET_AFTER_S: i64 = 48 * 3_600;

/// Maximum number of arguments of one `HSET` or `ZADD`; Lua's stack limits `unpack`.
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

/// Result of a script: the previous marker, and true if it was the expected one.
pub type Found = (Vec<u8>, bool);

impl Scripts {
    /// Returns the scripts with a part of one of them replaced.
    #[cfg(test)]
    pub fn altered(part: &str, other: &str) -> Self {
        assert_eq!([APPLY, MARK, DUE].iter().filter(|script| script.contains(part)).count(), 1, "{part}");
        let altered = |script: &str| Script::new(&script.replace(part, other));
        Self { apply: altered(APPLY), mark: altered(MARK), due: altered(DUE) }
    }

    pub async fn apply(
        &self,
        redis: &mut Redis,
        keys: &Keys,
        expected: &str,
        new: &str,
        writes: Writes,
    ) -> Result<Found, RedisError> {
        let mut call = self.apply.key(&keys.view);
        call.key(&keys.ends).key(&keys.id_counts);
        for id in &writes.id_keys {
            call.key(id);
        }
        call.arg(expected).arg(new).arg(REMEMBER_S);
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

    /// Returns the number of due keys, and the fields of expired values; nothing if the marker
    /// differs from the expected one.
    pub async fn due(&self, redis: &mut Redis, keys: &Keys, due: &Due) -> Result<(usize, Vec<Vec<u8>>), RedisError> {
        let mut call = self.due.key(&keys.view);
        call.key(&keys.ends).arg(due.now_ms).arg(due.again_ms).arg(due.limit).arg(&due.marker);
        call.invoke_async(redis).await
    }
}

/// Parameters of a search for due keys.
pub struct Due {
    pub marker: String,
    pub now_ms: i64,
    /// Time of the next check of keys that stay due.
    pub again_ms: i64,
    pub limit: usize,
}

/// A record that is applied by version.
pub struct Repeat {
    pub version: i64,
    /// Key that stores the state of an idempotent write.
    pub id_key: Option<String>,
    /// True if the id is to be stored.
    pub remember: bool,
    /// Time when the log stored the record, in seconds since the Unix epoch.
    pub appended_s: i64,
    /// Expiry of the entry, if any.
    pub ends_ms: Option<i64>,
}

/// Changes of a batch, in order.
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
        rest: Vec<u8>,
        id: usize,
        repeat: Repeat,
    },
}

impl Writes {
    /// Sets an entry that is newer than the current one.
    pub fn set(&mut self, field: &[u8], entry: Vec<u8>) {
        match self.groups.iter_mut().rev().find(|group| !matches!(group, Group::Ends(_))) {
            Some(Group::Set(pairs)) if pairs.len() < MAX_GROUP => pairs.extend([field.to_vec(), entry]),
            _ => self.groups.push(Group::Set(vec![field.to_vec(), entry])),
        }
    }

    /// Sets the expiry of an entry.
    pub fn ends(&mut self, field: &[u8], at_ms: i64) {
        let pair = [at_ms.to_string().into_bytes(), field.to_vec()];
        match self.groups.last_mut() {
            Some(Group::Ends(pairs)) if pairs.len() < MAX_GROUP => pairs.extend(pair),
            _ => self.groups.push(Group::Ends(pair.to_vec())),
        }
    }

    /// Sets an entry and its expiry, unless the current version is newer.
    pub fn set_unless_newer(&mut self, field: &[u8], entry: &[u8], mut repeat: Repeat) {
        let rest = entry.iter().position(|&byte| byte == b':').map_or(&[][..], |colon| &entry[colon + 1..]);
        let id = repeat.id_key.take().map_or(0, |key| {
            self.id_keys.push(key);
            // Index in KEYS, counted from one, after view, ends and counts.
            self.id_keys.len() + 3
        });
        let kind = entry.first().copied().unwrap_or(b'd');
        self.groups.push(Group::Conditional { field: field.to_vec(), kind, rest: rest.to_vec(), id, repeat });
    }

    fn add_to(self, call: &mut ScriptInvocation<'_>) {
        for group in self.groups {
            match group {
                Group::Set(pairs) => add_group(call, "H", pairs),
                Group::Ends(pairs) => add_group(call, "Z", pairs),
                Group::Conditional { field, kind, rest, id, repeat } => {
                    call.arg("C").arg(field).arg(&[kind][..]).arg(repeat.version).arg(rest).arg(id);
                    call.arg(repeat.appended_s).arg(repeat.ends_ms.map_or(String::new(), |ms| ms.to_string()));
                    call.arg(u8::from(repeat.remember));
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
