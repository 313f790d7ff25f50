//! [`Fleet`]: several sessions, one an adapter, behind one queue.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::engine::Statistics;
use crate::error::{Result, RuntimeError};
use crate::event::{Event, SequenceHandle};
use crate::sampling::GenerateRequest;
use crate::session::Session;

/// Statistics walk all page tables, so they are not read at every step.
const STATISTICS_EVERY: Duration = Duration::from_millis(100);

/// What a fleet tells of a sequence.
#[non_exhaustive]
#[derive(Debug)]
pub enum Report {
    /// What [`Session::submit`]'s handle would tell. After a device has failed, another one runs its sequences from
    /// their beginning, and their events come again from [`Event::Prompt`] on.
    Event(Event),
    /// The request cannot be served; nothing else follows.
    Refused(RuntimeError),
}

/// Several sessions of the same model, each on an adapter and a thread of its own, that take sequences from one queue: a
/// session takes the next one when it has a free slot, so faster adapters do more. What a sequence computes depends
/// on the adapter that runs it only as far as their arithmetic differs.
#[derive(Debug)]
pub struct Fleet {
    shared: Arc<Shared>,
    reports: Receiver<Result<(u64, Report)>>,
    workers: Vec<JoinHandle<()>>,
    next_id: u64,
    num_unfinished: usize,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Something was put into the queue, or the fleet goes.
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    queue: VecDeque<(u64, GenerateRequest)>,
    cancelled: HashSet<u64>,
    closes: bool,
    num_alive: usize,
    statistics: Vec<Statistics>,
}

impl Shared {
    /// A thread that panicked leaves nothing half-done in the state.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Fleet {
    /// Starts a thread for each session.
    ///
    /// # Panics
    /// Without any session.
    pub fn new(sessions: Vec<Session>) -> Self {
        assert!(!sessions.is_empty(), "a fleet has at least one session");
        let state = State {
            queue: VecDeque::new(),
            cancelled: HashSet::new(),
            closes: false,
            num_alive: sessions.len(),
            statistics: vec![Statistics::default(); sessions.len()],
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let (sender, reports) = channel();
        let start = |(index, session)| {
            let worker = Worker {
                index,
                session,
                shared: Arc::clone(&shared),
                reports: sender.clone(),
                running: BTreeMap::new(),
                counted: Instant::now(),
            };
            std::thread::spawn(move || worker.run())
        };
        let workers = sessions.into_iter().enumerate().map(start).collect();
        Self { shared, reports, workers, next_id: 0, num_unfinished: 0 }
    }

    /// Puts a request at the end of the queue; returns its number, in the order of arrival.
    pub fn submit(&mut self, request: GenerateRequest) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.num_unfinished += 1;
        self.shared.lock().queue.push_back((id, request));
        self.shared.changed.notify_one();
        id
    }

    /// Ends a sequence soon; its last event says so.
    pub fn cancel(&self, id: u64) {
        self.shared.lock().cancelled.insert(id);
    }

    /// Requests that have not been answered to the end.
    pub fn num_unfinished(&self) -> usize {
        self.num_unfinished
    }

    /// Waits for the next report of any sequence, with its number; `None` once every request has been answered.
    ///
    /// # Errors
    /// What made the last usable device fail; unanswered requests are lost then.
    pub fn next_report(&mut self) -> Option<Result<(u64, Report)>> {
        if self.num_unfinished == 0 {
            return None;
        }
        // The senders live as long as their threads, and the last one to fail says why.
        let report = self.reports.recv().ok()?;
        match &report {
            Ok((_, Report::Event(Event::Finished(_)) | Report::Refused(_))) => self.num_unfinished -= 1,
            Ok(_) => {}
            Err(_) => self.num_unfinished = 0,
        }
        Some(report)
    }

    /// What each session has done, a moment ago; exact for sessions that have nothing to do.
    pub fn statistics(&self) -> Vec<Statistics> {
        self.shared.lock().statistics.clone()
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        {
            let mut state = self.shared.lock();
            state.closes = true;
            state.queue.clear();
        }
        self.shared.changed.notify_all();
        for worker in self.workers.drain(..) {
            // A panic of a worker has been printed.
            let _ = worker.join();
        }
    }
}

struct Worker {
    index: usize,
    session: Session,
    shared: Arc<Shared>,
    reports: Sender<Result<(u64, Report)>>,
    /// Sequences of this session: what was asked, and their handles.
    running: BTreeMap<u64, (GenerateRequest, SequenceHandle)>,
    /// When statistics were last read.
    counted: Instant,
}

impl Worker {
    fn run(mut self) {
        while let Some(requests) = self.take_requests() {
            let Err(error) = self.advance(requests) else { continue };
            let mut state = self.shared.lock();
            state.num_alive -= 1;
            if state.num_alive == 0 {
                let _ = self.reports.send(Err(error));
            } else {
                tracing::error!("{error}; its sequences run on the other devices");
                for (id, (request, _)) in std::mem::take(&mut self.running).into_iter().rev() {
                    state.queue.push_front((id, request));
                }
                self.shared.changed.notify_all();
            }
            return;
        }
    }

    /// The requests that this session can run now; waits where it has nothing else to do. `None` at the end.
    fn take_requests(&mut self) -> Option<Vec<(u64, GenerateRequest)>> {
        let mut state = self.shared.lock();
        loop {
            if state.closes {
                return None;
            }
            if !state.cancelled.is_empty() {
                // One that waits is ended by the session that will take it.
                for (id, (_, handle)) in &self.running {
                    if state.cancelled.remove(id) {
                        handle.cancel();
                    }
                }
            }
            // One in advance, so that no slot stays free while results are on their way.
            let most = self.session.max_sequences() + 1;
            let room = most.saturating_sub(self.running.len()).min(state.queue.len());
            if room > 0 || !self.running.is_empty() {
                return Some(state.queue.drain(..room).collect());
            }
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn advance(&mut self, requests: Vec<(u64, GenerateRequest)>) -> Result<()> {
        for (id, request) in requests {
            match self.session.submit(&request) {
                Ok(handle) => {
                    self.running.insert(id, (request, handle));
                }
                Err(error @ RuntimeError::Kernel(_)) => {
                    self.shared.lock().queue.push_front((id, request));
                    return Err(error);
                }
                Err(error) => {
                    let _ = self.reports.send(Ok((id, Report::Refused(error))));
                }
            }
        }
        self.session.step()?;
        let mut events = Vec::new();
        self.running.retain(|id, (_, handle)| {
            while let Some(event) = handle.try_next() {
                let is_end = matches!(event, Event::Finished(_));
                events.push((*id, Report::Event(event)));
                if is_end {
                    return false;
                }
            }
            true
        });
        // Who sees the last sequence end finds it counted.
        if self.running.is_empty() || self.counted.elapsed() >= STATISTICS_EVERY {
            self.counted = Instant::now();
            let statistics = self.session.statistics();
            self.shared.lock().statistics[self.index] = statistics;
        }
        for event in events {
            let _ = self.reports.send(Ok(event));
        }
        Ok(())
    }
}
