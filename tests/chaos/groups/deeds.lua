-- What a consumer group does, in one step, so that whatever Redis loses later it loses whole. KEYS: the stream. ARGV:
-- the deed, the group, ids of entries. Returns ids of entries that are gone although the group is owed them.
--
-- The group "keeper" archives what it acknowledges. Whatever was trimmed rightly is therefore in the archive, and
-- whatever is in the archive once stood in the stream.
local stream, deed, group = KEYS[1], ARGV[1], ARGV[2]
local archive, times = 'archive:' .. stream, 'times:' .. stream
local acked, oldest = 'acked:' .. stream .. ':' .. group, 'oldest:' .. stream .. ':' .. group
local gone = {}

local function parts(id)
    local ms, seq = string.match(id, '^(%d+)-(%d+)$')
    return tonumber(ms), tonumber(seq)
end

local function is_before(one, other)
    local ms, seq = parts(one)
    local other_ms, other_seq = parts(other)
    return ms < other_ms or (ms == other_ms and seq < other_seq)
end

local function entry(id)
    return redis.call('XRANGE', stream, id, id)[1]
end

local function make()
    redis.call('XGROUP', 'CREATE', stream, group, '0', 'MKSTREAM')
    local first = redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
    redis.call('SET', oldest, first and first[1] or '0-0')
    redis.call('DEL', acked)
end

local function acknowledge(id)
    -- A Redis that has lost it has not delivered it.
    if #redis.call('XPENDING', stream, group, id, id, 1) == 0 then
        return
    end
    local found = entry(id)
    if not found then
        gone[#gone + 1] = id
        return
    end
    if group == 'keeper' then
        redis.call('HSET', archive, id, cjson.encode(found[2]))
        redis.call('ZADD', times, (parts(id)), id)
    else
        redis.call('SADD', acked, id)
    end
    redis.call('XACK', stream, group, id)
end

-- Of what has stood in the stream since the group was made, each entry is acknowledged, or there.
local function check()
    local first = redis.call('GET', oldest)
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', times, (parts(first)), '+inf')) do
        if not is_before(id, first) and redis.call('SISMEMBER', acked, id) == 0 and not entry(id) then
            gone[#gone + 1] = id
        end
    end
end

if deed == 'make' then
    make()
elseif deed == 'acknowledge' then
    for n = 3, #ARGV do
        acknowledge(ARGV[n])
    end
elseif deed == 'leave' then
    check()
    redis.call('XGROUP', 'DESTROY', stream, group)
    redis.call('DEL', acked, oldest)
end
return gone
