//! `hf:owner/name` against a Hub on this machine: what is fetched, resumed, refused, and what the cache does without it.

#![cfg(feature = "hub")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::{Value, json};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const FILES: [&str; 2] = ["config.json", "model.safetensors"];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../mor-model/tests/fixtures/golden/vanilla_gqa")
}

/// A request as far as the tests look at it.
#[derive(Clone, Debug)]
struct Request {
    path: String,
    authorization: Option<String>,
    first_byte: Option<usize>,
}

/// A few lines of HTTP that serve the model `owner/tiny`.
struct Hub {
    endpoint: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Hub {
    /// `cuts` are the numbers of bytes after which the first answers with weights break off.
    fn start(cuts: &[usize]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (seen, cuts) = (requests.clone(), Mutex::new(cuts.to_vec()));
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                // A program that has been told enough closes its end.
                let _ = answer(stream, &seen, &cuts);
            }
        });
        Self { endpoint, requests }
    }

    fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}

fn answer(mut stream: TcpStream, seen: &Mutex<Vec<Request>>, cuts: &Mutex<Vec<usize>>) -> std::io::Result<()> {
    let mut request = Request { path: String::new(), authorization: None, first_byte: None };
    let mut last_byte = None;
    for (index, line) in BufReader::new(&stream).lines().enumerate() {
        let line = line?;
        if line.is_empty() {
            break;
        }
        match line.split_once(": ") {
            _ if index == 0 => request.path = line.split(' ').nth(1).unwrap_or_default().to_owned(),
            Some((name, value)) if name.eq_ignore_ascii_case("authorization") => {
                request.authorization = Some(value.to_owned());
            }
            Some((name, value)) if name.eq_ignore_ascii_case("range") => {
                let (first, last) = value.trim_start_matches("bytes=").split_once('-').unwrap_or_default();
                (request.first_byte, last_byte) = (first.parse().ok(), last.parse::<usize>().ok());
            }
            _ => {}
        }
    }
    seen.lock().unwrap().push(request.clone());
    let file = request.path.strip_prefix(&format!("/owner/tiny/resolve/{COMMIT}/"));
    if let Some(name) = file.filter(|name| FILES.contains(name)) {
        let bytes = fs::read(golden().join(name))?;
        let first = request.first_byte.unwrap_or(0);
        let body = &bytes[first..last_byte.map_or(bytes.len(), |last| last + 1)];
        let head = format!(
            "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {first}-{}/{}\r\nETag: \"{}\"\r\n\
             X-Repo-Commit: {COMMIT}\r\nConnection: close\r\n\r\n",
            body.len(),
            first + body.len() - 1,
            bytes.len(),
            name.replace('.', "-"),
        );
        stream.write_all(head.as_bytes())?;
        let is_whole = last_byte.is_none() && name.ends_with(".safetensors");
        let mut cuts = cuts.lock().unwrap();
        let end = if is_whole && !cuts.is_empty() { cuts.remove(0).min(body.len()) } else { body.len() };
        return stream.write_all(&body[..end]);
    }
    let (status, body) = match request.path.strip_prefix("/api/models/") {
        Some("owner/tiny/revision/main" | "owner/tiny/revision/v1") => {
            let siblings: Vec<_> = FILES.iter().map(|name| json!({ "rfilename": name })).collect();
            ("200 OK", json!({ "sha": COMMIT, "siblings": siblings }).to_string())
        }
        Some(path) if path.starts_with("owner/gated/") => ("401 Unauthorized", String::new()),
        _ => ("404 Not Found", String::new()),
    };
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())
}

fn mor(endpoint: &str, home: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mor"));
    for name in ["HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
        command.env_remove(name);
    }
    command.env("HF_ENDPOINT", endpoint).env("HF_HOME", home).env("HF_TOKEN", "secret").args(args).output().unwrap()
}

fn inspected(output: &Output) -> Value {
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && message.is_empty(), "{message}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[track_caller]
fn refused(output: &Output, words: &[&str]) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.starts_with("error: ") && message.lines().count() == 1, "{message}");
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
}

const INSPECT: [&str; 3] = ["inspect", "hf:owner/tiny", "--json"];

#[test]
fn models_are_fetched_once_and_found_without_the_hub() {
    let (hub, home) = (Hub::start(&[]), tempfile::tempdir().unwrap());
    let report = inspected(&mor(&hub.endpoint, home.path(), &INSPECT));
    assert_eq!((&report["model"], &report["mode"]), (&json!("hf:owner/tiny"), &json!("vanilla")));
    assert!(hub.requests().iter().all(|request| request.authorization.as_deref() == Some("Bearer secret")));
    // As all programs of the Hub keep it.
    let snapshot = home.path().join("hub/models--owner--tiny/snapshots").join(COMMIT);
    for name in FILES {
        assert_eq!(fs::read(snapshot.join(name)).unwrap(), fs::read(golden().join(name)).unwrap());
    }

    // Again: the Hub is asked what is the newest, and nothing is sent.
    let before = hub.requests().len();
    inspected(&mor(&hub.endpoint, home.path(), &INSPECT));
    inspected(&mor(&hub.endpoint, home.path(), &["inspect", "hf:owner/tiny@v1", "--json"]));
    let again = &hub.requests()[before..];
    assert!(again.len() == 2 && again.iter().all(|request| request.path.starts_with("/api/")), "{again:?}");

    // Nobody listens on port 1.
    let nowhere = "http://127.0.0.1:1";
    assert_eq!(inspected(&mor(nowhere, home.path(), &INSPECT)), report);
    let commit = format!("hf:owner/tiny@{COMMIT}");
    inspected(&mor(nowhere, home.path(), &["inspect", &commit, "--json"]));
    let words = ["hf:owner/tiny: cannot be fetched from http://127.0.0.1:1 (", "local folder", "cache"];
    refused(&mor(nowhere, tempfile::tempdir().unwrap().path(), &INSPECT), &words);
    refused(&mor(nowhere, home.path(), &["inspect", "hf:owner/other"]), &["hf:owner/other: cannot be fetched"]);
    // A cache that lacks the weights is no model.
    fs::remove_file(snapshot.join("model.safetensors")).unwrap();
    refused(&mor(nowhere, home.path(), &INSPECT), &["is not complete in the cache"]);
}

#[test]
fn interrupted_transfers_go_on_where_they_stopped() {
    let (hub, home) = (Hub::start(&[1000, 2000]), tempfile::tempdir().unwrap());
    inspected(&mor(&hub.endpoint, home.path(), &INSPECT));
    let is_weights = |request: &Request| request.path.ends_with("model.safetensors");
    let starts: Vec<_> =
        hub.requests().into_iter().filter(is_weights).filter_map(|request| request.first_byte).collect();
    // Each attempt asks for the size first.
    assert_eq!(starts, [0, 0, 0, 1000, 0, 3000]);

    // Given up after some attempts; a later call has the rest to fetch only.
    let (hub, home) = (Hub::start(&[1000, 0, 0, 0]), tempfile::tempdir().unwrap());
    let words = ["hf:owner/tiny: model.safetensors did not come whole", "goes on from there"];
    refused(&mor(&hub.endpoint, home.path(), &INSPECT), &words);
    inspected(&mor(&hub.endpoint, home.path(), &INSPECT));
    assert_eq!(hub.requests().last().unwrap().first_byte, Some(1000));
}

#[test]
fn what_the_hub_refuses_is_said() {
    let (hub, home) = (Hub::start(&[]), tempfile::tempdir().unwrap());
    let inspect = |model: &str| mor(&hub.endpoint, home.path(), &["inspect", model]);
    refused(&inspect("hf:owner/absent"), &["hf:owner/absent: is not there", "HF_TOKEN", "answers 404"]);
    refused(&inspect("hf:owner/tiny@v9"), &["hf:owner/tiny@v9: is not there", "revision"]);
    refused(&inspect("hf:owner/gated"), &["needs a permission", "HF_TOKEN", "answers 401"]);
    for name in ["hf:", "hf:tiny", "hf:owner/tiny/x", "hf:../tiny", "hf:owner/tiny@../x"] {
        refused(&inspect(name), &[name, "expected hf:owner/name"]);
    }
}

/// Every command that takes a model folder takes a name.
#[test]
fn names_stand_wherever_a_folder_does() {
    let (hub, home) = (Hub::start(&[]), tempfile::tempdir().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let out = |name: &str| dir.path().join(name).display().to_string();
    for args in [
        ["quantize", "hf:owner/tiny", &out("q8"), "--to", "q8"],
        ["convert", "hf:owner/tiny", &out("f32"), "--dtype", "f32"],
    ] {
        let output = mor(&hub.endpoint, home.path(), &args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(Path::new(args[2]).join("model.safetensors").is_file());
    }
    // Without the network, refused for what comes after the model was found.
    let nowhere = |args: &[&str], words: &[&str]| refused(&mor("http://127.0.0.1:1", home.path(), args), words);
    nowhere(&["generate", "--model", "hf:owner/tiny", "--prompt-tokens", "97"], &["--prompt-tokens[0]"]);
    let tokens = golden().join("absent.safetensors").display().to_string();
    nowhere(&["forward", "--model", "hf:owner/tiny", "--tokens", &tokens, "--out", &out("x")], &["absent.safetensors"]);
    nowhere(&["bench", "throughput", "--model", "hf:owner/tiny"], &["mode vanilla", "expected mode expert"]);
    let text = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/valid-40.txt");
    nowhere(&["eval", "--model", "hf:owner/tiny", "--text", text], &["tokenizer"]);
}
