-- Sets the password of a backend so that no log, view or history shows it:
--
--   psql -d app -v backend=default -f contrib/set_backend_password.sql
--   psql -d app -v backend=default -f contrib/set_backend_password.sql < password-file
--
-- The password is read without an echo, or from the first line of standard input, and is sent as data of a COPY, which appear in no
-- statement and no parameter. Needs the right to execute outbox.set_backend_password(), and TEMPORARY on the database.

\set ON_ERROR_STOP on
\set QUIET on
\pset pager off
\pset tuples_only on
begin;
set local client_min_messages = warning;
create temporary table new_password (password text not null check (password <> '')) on commit drop;
\copy new_password from program 'if [ -t 0 ]; then stty -echo; printf "Password: " >&2; fi; IFS= read -r password; if [ -t 0 ]; then stty echo; echo >&2; fi; printf "%s\n" "$password"' with (format csv, delimiter E'\x01', quote E'\x02')
select outbox.set_backend_password(:'backend', (select password from new_password));
commit;
