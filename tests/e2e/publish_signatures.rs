//! Which signature of `publish_event` Postgres takes: no call is ambiguous, and parameters without types are those of
//! the documented one.

use kit::{Stack, types};
use postgres::types::{Json, Type};
use serde_json::{Value, json};

/// Each argument in each type that a driver may send, in all combinations: Postgres finds one function, and knows the
/// types.
#[test]
fn no_call_is_ambiguous() {
    let stack = Stack::start();
    let jsons = [
        "",
        "null",
        "$",
        "'1'",
        "'1'::json",
        "'1'::jsonb",
        "'1'::text",
        "'1'::varchar",
    ];
    let numbers = ["", "null", "$", "1", "1::smallint", "1::bigint", "1.0", "1::float8"];
    let rest = [
        "",
        "scheduled_at => now()",
        "scheduled_at => localtimestamp",
        "event_id => gen_random_uuid()",
        "event_id => 'x'::text",
        "scheduled_at => null, event_id => null",
    ];
    let mut calls = Vec::new();
    for event_type in ["'t'", "$", "'t'::text", "'t'::varchar", "'t'::name"] {
        for source in ["'s'", "$", "'s'::text", "'s'::varchar"] {
            for data in jsons {
                for max_retries in numbers {
                    for config in jsons {
                        for rest in rest {
                            calls.push(call(&[
                                ("", event_type),
                                ("", source),
                                ("data => ", data),
                                ("max_retries => ", max_retries),
                                ("publisher_config => ", config),
                                ("", rest),
                            ]));
                        }
                    }
                }
            }
        }
    }
    assert_eq!(calls.len(), 5 * 4 * 8 * 8 * 8 * 6);
    expect_prepared(&stack, &calls);
}

/// The same of subjects and times, beside each kind of data and number.
#[test]
fn no_subject_and_no_time_makes_a_call_ambiguous() {
    let stack = Stack::start();
    let datas = ["'1'", "$", "'1'::json", "'1'::jsonb", "array[1]", "true"];
    let numbers = ["", "$", "7::bigint", "'7'::text", "true"];
    let subjects = [
        "",
        "$",
        "'x'",
        "'x'::text",
        "'x'::varchar",
        "'x'::name",
        "7",
        "7::bigint",
        "gen_random_uuid()",
    ];
    let times = [
        "",
        "$",
        "null",
        "now()",
        "localtimestamp",
        "current_date",
        "'2100-01-01'::text",
        "'2100-01-01'::varchar",
        "interval '1 h'",
        "5",
        "5::float8",
    ];
    let mut calls = Vec::new();
    for event_type in ["'t'", "$", "'t'::text", "'t'::varchar", "'t'::name"] {
        for source in ["'s'", "$", "'s'::text", "'s'::varchar", "'s'::name"] {
            for data in datas {
                for max_retries in numbers {
                    for subject in subjects {
                        calls.extend(times.map(|scheduled_at| {
                            call(&[
                                ("", event_type),
                                ("", source),
                                ("", data),
                                ("max_retries => ", max_retries),
                                ("subject => ", subject),
                                ("scheduled_at => ", scheduled_at),
                            ])
                        }));
                    }
                }
            }
        }
    }
    assert_eq!(calls.len(), 5 * 5 * 6 * 5 * 9 * 11);
    expect_prepared(&stack, &calls);
}

/// A call with these arguments; `$` stands for a parameter.
fn call(arguments: &[(&str, &str)]) -> String {
    let mut places = 0;
    let given = arguments
        .iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| match *value {
            "$" => {
                places += 1;
                format!("{name}${places}")
            }
            value => format!("{name}{value}"),
        });
    let given: Vec<String> = given.collect();
    format!("outbox.publish_event({})", given.join(", "))
}

fn expect_prepared(stack: &Stack, calls: &[String]) {
    let mut client = stack.pg.client();
    client
        .batch_execute(
            "create function pg_temp.try(calls text[]) returns bigint language plpgsql as $$
            declare
                call text;
            begin
                foreach call in array calls loop
                    execute 'prepare p as select ' || call;
                    deallocate p;
                end loop;
                return cardinality(calls);
            exception when others then
                raise exception '%: %', call, sqlerrm;
            end $$",
        )
        .unwrap();
    let tried: i64 = client.query_one("select pg_temp.try($1)", &[&calls]).unwrap().get(0);
    assert_eq!(tried, calls.len() as i64);
}

/// A driver that asks for the types of parameters hears those of the documented function.
#[test]
fn untyped_parameters_are_those_of_the_documented_function() {
    let stack = Stack::start();
    stack
        .pg
        .exec("create role publisher login; select outbox.grant_publisher('publisher')");
    let mut client = stack.pg.client_as("publisher", "postgres");
    let statement = client
        .prepare("select outbox.publish_event($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)")
        .unwrap();
    let documented = [
        Type::TEXT,
        Type::TEXT,
        Type::JSONB,
        Type::TEXT,
        Type::TEXT,
        Type::TIMESTAMPTZ,
        Type::INT4,
        Type::JSONB,
        Type::TEXT,
        Type::TEXT,
        Type::UUID,
    ];
    assert_eq!(statement.params(), documented);
    let named = client
        .prepare(
            "select outbox.publish_event(event_type => $1, source => $2, publisher_config => $3, max_retries => $4)",
        )
        .unwrap();
    assert_eq!(named.params(), [Type::TEXT, Type::TEXT, Type::JSONB, Type::INT4]);
    // A driver that says the types itself.
    let text = "{\"a\": 1}";
    let value = json!({"a": 1});
    for data in [Type::JSON, Type::JSONB] {
        let typed = client
            .prepare_typed(
                "select outbox.publish_event($1, $2, $3, $4)",
                &[Type::VARCHAR, Type::VARCHAR, data],
            )
            .unwrap();
        client
            .query_one(&typed, &[&"typed", &"s", &Json(&value), &None::<&str>])
            .unwrap();
    }
    for data in [Type::TEXT, Type::VARCHAR, Type::BPCHAR] {
        let typed = client
            .prepare_typed(
                "select outbox.publish_event($1, $2, $3)",
                &[Type::TEXT, Type::TEXT, data],
            )
            .unwrap();
        client.query_one(&typed, &[&"typed", &"s", &text]).unwrap();
    }
    let typed = client
        .prepare_typed(
            "select outbox.publish_event($1, $2, $3, max_retries => $4)",
            &[Type::TEXT, Type::TEXT, Type::BYTEA, Type::INT8],
        )
        .unwrap();
    client
        .query_one(&typed, &[&"typed", &"s", &text.as_bytes(), &3i64])
        .unwrap();
    let entries = stack.wait_events(6);
    assert_eq!(types(&entries), ["typed"; 6]);
    for entry in &entries {
        let event: Value = serde_json::from_str(entry.field("cloud_event")).unwrap();
        assert_eq!(event["data"], value);
    }
}
