//! Brings notices to their receivers in the background, in order, as often as it takes within limits.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, timeout};

use crate::notify::{Notice, Notifier};
use crate::observe::task;

/// Notices that may wait for one receiver; a receiver that is away for long learns of the first ones.
const QUEUE: usize = 256;
/// How long one notice is tried.
const LONGEST: Duration = Duration::from_secs(3600);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Takes notices and never keeps anybody waiting. Without receivers it forgets them.
#[derive(Debug, Clone, Default)]
pub struct Courier {
    desk: Arc<Desk>,
}

#[derive(Debug, Default)]
struct Desk {
    lanes: OnceLock<Vec<Lane>>,
    under_way: AtomicUsize,
    arrived: Notify,
}

#[derive(Debug)]
struct Lane {
    notifier: Arc<dyn Notifier>,
    queue: mpsc::Sender<Notice>,
}

impl Courier {
    /// Names the receivers, once; later calls change nothing.
    pub fn serve(&self, notifiers: Vec<Arc<dyn Notifier>>) {
        self.desk.lanes.get_or_init(|| {
            let lane = |notifier: Arc<dyn Notifier>| {
                let (queue, notices) = mpsc::channel(QUEUE);
                // It ends with the last courier.
                task::spawn("notify", bring(Arc::clone(&notifier), notices, Arc::downgrade(&self.desk)));
                Lane { notifier, queue }
            };
            notifiers.into_iter().map(lane).collect()
        });
    }

    /// The receivers.
    pub fn notifiers(&self) -> impl Iterator<Item = &Arc<dyn Notifier>> {
        self.desk.lanes.get().into_iter().flatten().map(|lane| &lane.notifier)
    }

    /// Takes a notice for everybody who wants it.
    pub fn tell(&self, notice: &Notice) {
        for lane in self.desk.lanes.get().into_iter().flatten().filter(|lane| lane.notifier.wants(notice)) {
            self.desk.under_way.fetch_add(1, Ordering::SeqCst);
            if lane.queue.try_send(notice.clone()).is_err() {
                self.desk.done();
                tracing::error!(to = lane.notifier.describe(), "a notice is not sent: too many wait already");
            }
        }
    }

    /// Waits until everything has arrived or was given up; says whether that was so within `limit`.
    pub async fn flush(&self, limit: Duration) -> bool {
        let all = async {
            loop {
                let arrived = self.desk.arrived.notified();
                if self.desk.under_way.load(Ordering::SeqCst) == 0 {
                    return;
                }
                arrived.await;
            }
        };
        timeout(limit, all).await.is_ok()
    }
}

impl Desk {
    fn done(&self) {
        self.under_way.fetch_sub(1, Ordering::SeqCst);
        self.arrived.notify_waiters();
    }
}

async fn bring(notifier: Arc<dyn Notifier>, mut notices: mpsc::Receiver<Notice>, desk: std::sync::Weak<Desk>) {
    while let Some(notice) = notices.recv().await {
        deliver(notifier.as_ref(), &notice).await;
        if let Some(desk) = desk.upgrade() {
            desk.done();
        }
    }
}

async fn deliver(notifier: &dyn Notifier, notice: &Notice) {
    let end = Instant::now() + LONGEST;
    let (mut pause, mut told) = (FIRST_PAUSE, false);
    loop {
        match notifier.tell(notice).await {
            Ok(answer) => {
                tracing::debug!(to = notifier.describe(), answer, "told");
                return;
            }
            Err(error) if error.is_transient() && Instant::now() + pause < end => {
                // Once: an outage of an hour is not sixty warnings.
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%error, to = notifier.describe(), "a notice waits");
                }
            }
            Err(error) => {
                tracing::error!(%error, to = notifier.describe(), "a notice is given up");
                return;
            }
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use async_trait::async_trait;
    use chrono::DateTime;

    use super::*;
    use crate::notify::{NotifyError, Page, Span};

    /// Refuses so many times, then takes everything.
    #[derive(Debug)]
    struct Sulky {
        error: NotifyError,
        times: AtomicUsize,
        taken: Mutex<Vec<Notice>>,
    }

    #[async_trait]
    impl Notifier for Sulky {
        fn describe(&self) -> String {
            "sulky".into()
        }

        fn wants(&self, notice: &Notice) -> bool {
            matches!(notice, Notice::Page(_))
        }

        async fn tell(&self, notice: &Notice) -> Result<String, NotifyError> {
            let left = self.times.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |times| times.checked_sub(1));
            if left.is_ok() {
                return Err(self.error.clone());
            }
            self.taken.lock().unwrap().push(notice.clone());
            Ok("200".into())
        }
    }

    fn page(resolved: bool) -> Notice {
        let at = DateTime::UNIX_EPOCH;
        let (problem, title, text, host) = ("p".to_owned(), "t".to_owned(), String::new(), "h".to_owned());
        Notice::Page(Page { problem, resolved, title, text, at, host })
    }

    async fn sent(error: NotifyError, times: usize, limit: Duration) -> (bool, Vec<Notice>) {
        let sulky = Arc::new(Sulky { error, times: times.into(), taken: Mutex::default() });
        let courier = Courier::default();
        courier.tell(&page(false));
        courier.serve(vec![Arc::clone(&sulky) as Arc<dyn Notifier>]);
        let at = DateTime::UNIX_EPOCH;
        courier.tell(&Notice::Span(Span { began: at, ended: at, tags: Vec::new(), text: String::new() }));
        courier.tell(&page(false));
        courier.tell(&page(true));
        let all = courier.flush(limit).await;
        let taken = sulky.taken.lock().unwrap().clone();
        (all, taken)
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_delays_pages_and_keeps_their_order() {
        let away = NotifyError::Unavailable { host: "h".into(), reason: "503".into() };
        let (all, taken) = sent(away.clone(), 5, Duration::from_secs(120)).await;
        assert_eq!((all, taken), (true, vec![page(false), page(true)]));
        // Whoever cannot wait goes on without.
        assert_eq!(sent(away, 50, Duration::from_secs(5)).await, (false, Vec::new()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_not_repeated() {
        let no = NotifyError::Refused { host: "h".into(), reason: "400".into() };
        assert_eq!(sent(no, 1, Duration::from_secs(1)).await, (true, vec![page(true)]));
    }
}
