//! JSON Schema, as far as ours goes. A keyword that is not known here fails the test instead of passing unread.

use serde_json::Value;

/// What is wrong with `value`, by the schema `root`.
///
/// # Errors
/// The first thing that does not fit, with its place.
pub fn validate(root: &Value, value: &Value) -> Result<(), String> {
    fits(root, root, value, "$")
}

fn fits(root: &Value, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
    for (keyword, wanted) in schema.as_object().unwrap() {
        let wrong = || Err(format!("{at}: {value} is not {keyword} {wanted}"));
        match keyword.as_str() {
            "$schema" | "$id" | "$defs" | "title" | "description" => {}
            "$ref" => {
                let name = wanted.as_str().unwrap().strip_prefix("#/$defs/").unwrap();
                fits(root, &root["$defs"][name], value, at)?;
            }
            "type" => {
                let types = wanted.as_array().cloned().unwrap_or_else(|| vec![wanted.clone()]);
                if !types.iter().any(|name| is_of(value, name.as_str().unwrap())) {
                    return wrong();
                }
            }
            "const" if value != wanted => return wrong(),
            "enum" if !wanted.as_array().unwrap().contains(value) => return wrong(),
            "const" | "enum" => {}
            "minimum" if value.is_number() && value.as_f64() < wanted.as_f64() => return wrong(),
            "minimum" => {}
            "format" => {
                assert_eq!(wanted, "date-time");
                if value.as_str().is_some_and(|text| chrono::DateTime::parse_from_rfc3339(text).is_err()) {
                    return wrong();
                }
            }
            "required" => {
                let missing = wanted.as_array().unwrap().iter().find(|key| value.get(key.as_str().unwrap()).is_none());
                if let (Some(missing), true) = (missing, value.is_object()) {
                    return Err(format!("{at}: {missing} is missing"));
                }
            }
            "properties" => {
                for (key, schema) in wanted.as_object().unwrap() {
                    if let Some(inner) = value.get(key) {
                        fits(root, schema, inner, &format!("{at}.{key}"))?;
                    }
                }
            }
            "additionalProperties" => {
                assert_eq!(wanted, false, "{at}: only closed objects");
                let known = schema["properties"].as_object().unwrap();
                let unknown = value.as_object().and_then(|object| object.keys().find(|key| !known.contains_key(*key)));
                if let Some(unknown) = unknown {
                    return Err(format!("{at}: {unknown} is not in the schema"));
                }
            }
            "items" => {
                for (number, item) in value.as_array().into_iter().flatten().enumerate() {
                    fits(root, wanted, item, &format!("{at}[{number}]"))?;
                }
            }
            "oneOf" => {
                let tried: Vec<_> =
                    wanted.as_array().unwrap().iter().map(|schema| fits(root, schema, value, at)).collect();
                if tried.iter().filter(|fit| fit.is_ok()).count() != 1 {
                    return Err(format!("{at}: not exactly one fits: {tried:?}"));
                }
            }
            other => panic!("{at}: this validator does not know `{other}`"),
        }
    }
    Ok(())
}

fn is_of(value: &Value, name: &str) -> bool {
    match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("no type `{other}`"),
    }
}
