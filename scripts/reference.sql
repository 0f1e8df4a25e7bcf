-- Prints docs/reference.md from what a server says of itself: its settings, and the COMMENTs of the extension. Run it where the extension
-- exists and no outbox_relay.* is set (tests/e2e/documents.rs does, and says how to write the document anew).
\pset format unaligned
\pset tuples_only on
\pset footer off
set search_path = pg_catalog, pg_temp;

create temporary view said as
select c.classoid, c.objoid, c.objsubid, replace(c.description, '|', '\|') as text from pg_description c;

create temporary view functions as
select p.oid, p.proname as name, p.prokind, p.prorettype,
    -- The type of a NULL is that of its argument.
    format('`outbox.%s(%s)`', p.proname, regexp_replace(replace(pg_get_function_arguments(p.oid), 'pg_catalog.', ''),
        'NULL::[a-z_. ]+', 'NULL', 'g')) as call,
    case when p.prokind = 'p' then '' else replace(pg_get_function_result(p.oid), 'pg_catalog.', '') end as result,
    coalesce(s.text, '') as text,
    p.proname in ('publish_event', 'publish_events', 'grant_publisher', 'revoke_publisher', 'set_backend_password', 'health',
        'wait_published', 'drain', 'published_here', 'preview', 'test_backend', 'retry_failed', 'retry_all_failed', 'discard_failed', 'replay', 'erase', 'wake',
        'purge', 'take_over', 'guard_key', 'hash_slot', 'attach_table', 'detach_table', 'consume_once', 'import_django_broadcaster') as is_called
from pg_proc p left join said s on s.classoid = 'pg_proc'::regclass and s.objoid = p.oid
where p.pronamespace = 'outbox'::regnamespace;

create temporary view relations as
select c.oid, c.relname as name, c.relkind, coalesce(s.text, '') as text
from pg_class c left join said s on s.classoid = 'pg_class'::regclass and s.objoid = c.oid and s.objsubid = 0
where c.relnamespace = 'outbox'::regnamespace and c.relkind in ('r', 'v');

create temporary view columns as
select a.attrelid, a.attnum, a.attname as name, format_type(a.atttypid, a.atttypmod) as type,
    case when d.oid is not null and a.attidentity = '' then format('`%s`', regexp_replace(replace(pg_get_expr(d.adbin, d.adrelid), '|', '\|'), '^''(.*)''::[a-z\[\]]+$', '\1'))
        when a.attidentity <> '' then 'drawn' when a.attnotnull then 'required' else 'NULL' end as ifleft,
    coalesce(s.text, '') as text
from pg_attribute a
    left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
    left join said s on s.classoid = 'pg_class'::regclass and s.objoid = a.attrelid and s.objsubid = a.attnum
where a.attnum > 0 and not a.attisdropped;

\echo '# Reference'
\echo
\echo '<!-- Written by scripts/reference.sql from the settings and the COMMENTs of the extension: change those, not this page. -->'
\echo
\echo 'Every setting, column, view and function, as a server with outbox_relay describes them. `psql` shows the same:'
\echo '`\\d+ outbox.backends`, `\\df+ outbox.*`. How they belong together: [guide.md](guide.md), [backends.md](backends.md),'
\echo '[operations.md](operations.md).'
\echo
\echo '- [Settings](#settings)'
\echo '- [outbox.backends](#outboxbackends)'
\echo '- [outbox.events](#outboxevents)'
\echo '- [Views](#views)'
\echo '- [Functions](#functions)'
\echo '- [Tables](#tables)'
\echo '- [Inside](#inside)'
\echo
\echo '## Settings'
\echo
\echo 'Set them in postgresql.conf or with ALTER SYSTEM. *reload*: takes effect on a reload. *user*: also per role, database or'
\echo 'session. *superuser*: also per session, by superusers.'
\echo
\echo '| setting | default | range | takes effect | meaning |'
\echo '|---|---|---|---|---|'
select format('| `%s` | %s | %s | %s | %s |', s.name,
    case when current_setting(s.name) = '' then '(empty)' else format('`%s`', current_setting(s.name)) end,
    case when s.vartype = 'enum' then (select string_agg(format('`%s`', e), ', ') from unnest(s.enumvals) e)
        when s.vartype in ('integer', 'real') then format('%s to %s%s', s.min_val, s.max_val, coalesce(' ' || s.unit, ''))
        else '' end,
    case s.context when 'sighup' then 'reload' else s.context end,
    replace(concat_ws(' ', s.short_desc, nullif(s.extra_desc, '')), '|', '\|'))
from pg_settings s where s.name like 'outbox\_relay.%' order by s.name collate "C";

\echo
\echo '## outbox.backends'
\echo
select r.text from relations r where r.name = 'backends';
\echo
\echo '| column | type | if left out | meaning |'
\echo '|---|---|---|---|'
select format('| `%s` | %s | %s | %s |', c.name, c.type, c.ifleft, c.text)
from columns c where c.attrelid = 'outbox.backends'::regclass order by c.attnum;

\echo
\echo '## outbox.events'
\echo
select r.text from relations r where r.name = 'events';
\echo
\echo 'A publisher may insert those columns that it fills; [guide.md](guide.md#arguments) explains them.'
\echo
\echo '| column | type | meaning |'
\echo '|---|---|---|'
select format('| `%s` | %s | %s |', c.name, c.type, c.text)
from columns c where c.attrelid = 'outbox.events'::regclass order by c.attnum;

\echo
\echo '## Views'
\echo
\echo 'Readable by `pg_monitor`; without payloads and passwords.'
\echo
\echo '| view | columns | meaning |'
\echo '|---|---|---|'
select format('| `outbox.%s` | %s | %s |', r.name,
    (select string_agg(format('`%s` %s', c.name, c.type), ', ' order by c.attnum) from columns c where c.attrelid = r.oid), r.text)
from relations r where r.relkind = 'v' order by r.name collate "C";

\echo
\echo '## Functions'
\echo
\echo '| call | returns | meaning |'
\echo '|---|---|---|'
select format('| %s | %s | %s |', f.call, f.result, f.text) from functions f
where f.is_called order by f.name collate "C", f.call collate "C";

\echo
\echo '## Tables'
\echo
\echo '| table | meaning |'
\echo '|---|---|'
select format('| `outbox.%s` | %s |', r.name, r.text) from relations r where r.relkind = 'r' order by r.name collate "C";

\echo
\echo '## Inside'
\echo
\echo 'The rest of schema `outbox`: the extension calls these itself.'
\echo
\echo '| function | meaning |'
\echo '|---|---|'
select format('| %s | %s |', f.call, f.text) from functions f
where not f.is_called order by f.name collate "C", f.call collate "C";
