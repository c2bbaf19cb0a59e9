SET timezone = 'UTC';
SELECT count(*), sum(amount), md5(string_agg(ledger::text, ',' ORDER BY id)) FROM ledger;
SELECT id, length(text), left(text, 30) FROM notes ORDER BY id;
SELECT to_regclass('dropped') IS NULL, count(*), md5(string_agg(later::text, ',' ORDER BY g)) FROM later;
SELECT string_agg(datname, ',') FROM pg_database;
