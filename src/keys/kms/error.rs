//! The one place where the SDK's errors get a meaning.

use std::error::Error as StdError;

use aws_sdk_kms::config::http::HttpResponse;
use aws_sdk_kms::error::{ProvideErrorMetadata, SdkError};

use crate::keys::KeyError;

/// What was asked of KMS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    Wrap,
    Open,
}

/// Codes that ask to come again, beside every status 5xx.
const BUSY: [&str; 9] = [
    "ThrottlingException",
    "Throttling",
    "RequestLimitExceeded",
    "LimitExceededException",
    "DependencyTimeoutException",
    "KeyUnavailableException",
    "KMSInternalException",
    "ServiceUnavailable",
    "InternalFailure",
];

/// The meaning of a failed call.
pub(super) fn meaning<E>(holder: &str, call: Call, error: &SdkError<E, HttpResponse>) -> KeyError
where
    E: ProvideErrorMetadata + StdError + Send + Sync + 'static,
{
    let holder = holder.to_owned();
    match error {
        SdkError::ServiceError(service) => {
            let status = service.raw().status().as_u16();
            let (code, message) = (service.err().code().unwrap_or("no code"), service.err().message().unwrap_or(""));
            let reason = format!("{code} (HTTP {status}) {message}").trim_end().to_owned();
            by_code(holder, call, (code, status), reason)
        }
        // Credentials are fetched within the call; their absence is no outage, though the SDK files both together.
        SdkError::DispatchFailure(failure) if !failure.is_io() && !failure.is_timeout() => {
            let reason = causes(error);
            if reason.contains("credential") {
                return KeyError::Denied { holder, reason: format!("no usable credentials: {reason}") };
            }
            KeyError::Unavailable { holder, reason }
        }
        SdkError::ConstructionFailure(_) => KeyError::Invalid { reason: format!("{holder}: {}", causes(error)) },
        _ => KeyError::Unavailable { holder, reason: causes(error) },
    }
}

fn by_code(holder: String, call: Call, (code, status): (&str, u16), reason: String) -> KeyError {
    match code {
        "InvalidCiphertextException" | "IncorrectKeyException" => KeyError::Wrong { holder, reason },
        _ if BUSY.contains(&code) || status >= 500 || status == 429 => KeyError::Unavailable { holder, reason },
        "ValidationException" if call == Call::Open => KeyError::Wrong { holder, reason },
        "ValidationException" => KeyError::Invalid { reason: format!("{holder}: {reason}") },
        // Access denied, key disabled, pending deletion, not found, wrong usage, bad or expired credentials.
        _ => KeyError::Denied { holder, reason },
    }
}

/// The SDK's own Display says only "dispatch failure".
fn causes(error: &(dyn StdError + 'static)) -> String {
    let mut texts: Vec<String> = Vec::new();
    let mut link = Some(error);
    while let Some(cause) = link {
        let text = cause.to_string();
        if !texts.last().is_some_and(|last| last.contains(&text)) {
            texts.push(text);
        }
        link = cause.source();
    }
    texts.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_the_meaning_that_decides_what_to_do() {
        let meaning = |call, code, status| by_code("KMS".into(), call, (code, status), String::new());
        for (code, status) in [
            ("ThrottlingException", 400),
            ("KMSInternalException", 500),
            ("no code", 503),
            ("x", 429),
            ("KeyUnavailableException", 500),
        ] {
            assert!(matches!(meaning(Call::Wrap, code, status), KeyError::Unavailable { .. }), "{code}");
        }
        for code in ["AccessDeniedException", "DisabledException", "KMSInvalidStateException", "NotFoundException"] {
            assert!(matches!(meaning(Call::Open, code, 400), KeyError::Denied { .. }), "{code}");
        }
        for code in ["InvalidCiphertextException", "IncorrectKeyException", "ValidationException"] {
            assert!(matches!(meaning(Call::Open, code, 400), KeyError::Wrong { .. }), "{code}");
        }
        assert!(matches!(meaning(Call::Wrap, "ValidationException", 400), KeyError::Invalid { .. }));
    }
}
