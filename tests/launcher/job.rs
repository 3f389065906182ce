//! The launcher as a user starts it, in a folder of its own.

use std::{
    fs,
    io::Read,
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread::{self, JoinHandle, sleep},
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// No test takes longer.
const PATIENCE: Duration = Duration::from_secs(40);

/// What a launcher answered.
pub struct Said {
    /// The exit code; −1 for a launcher that a signal ended.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Said {
    /// Fails unless the code is this one and standard error holds all the parts.
    pub fn expect(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, code, "{}{}", self.out, self.err);
        for part in parts {
            assert!(self.err.contains(part), "no `{part}` in: {}", self.err);
        }
    }

    /// Standard output's lines, sorted.
    pub fn lines(&self) -> Vec<&str> {
        let mut lines: Vec<_> = self.out.lines().collect();
        lines.sort_unstable();
        lines
    }
}

/// A launcher that runs. Dropped, it is killed.
pub struct Job {
    child: Child,
    texts: Option<[JoinHandle<String>; 2]>,
}

impl Job {
    /// The launcher's process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends the launcher a signal.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// Waits for the end.
    pub fn end(mut self) -> Said {
        let start = Instant::now();
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if start.elapsed() > PATIENCE => {
                    self.child.kill().unwrap();
                    break self.child.wait().unwrap();
                }
                None => sleep(Duration::from_millis(5)),
            }
        };
        let [out, err] = self.texts.take().unwrap().map(|text| text.join().unwrap());
        assert!(start.elapsed() < PATIENCE, "it did not end: {out}{err}");
        assert!(!err.contains("panicked"), "{err}");
        Said { code: status.code().unwrap_or(-1), out, err }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder that programs are started in.
pub struct Place(TempDir);

impl Place {
    /// An empty one.
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// The launcher, not yet started: options divided at spaces, and what a shell does as every process.
    pub fn command(&self, options: &str, script: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mupscale-launch"));
        command.args(options.split_whitespace());
        if !script.is_empty() {
            command.args(["sh", "-c", script]);
        }
        command.current_dir(self.path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A machine with GPUs refuses more processes than it has: no test here needs one.
        command.env("CUDA_VISIBLE_DEVICES", "").env_remove("OMP_NUM_THREADS");
        command
    }

    /// Starts it.
    pub fn start(&self, options: &str, script: &str) -> Job {
        begin(self.command(options, script))
    }

    /// Runs it to its end.
    pub fn run(&self, options: &str, script: &str) -> Said {
        self.start(options, script).end()
    }

    /// Whether a file is there.
    pub fn has(&self, name: &str) -> bool {
        self.path().join(name).exists()
    }

    /// Reads a file.
    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// The names in a folder.
    pub fn names(&self, name: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path().join(name)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Writes a file.
    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.path().join(name), text).unwrap();
    }

    /// Waits for files that processes write, and for what is in them: a shell makes a file before it writes to it.
    pub fn wait_for(&self, names: &[&str]) {
        let start = Instant::now();
        let empty = |name: &&&str| !self.path().join(name).metadata().is_ok_and(|found| found.len() > 0);
        while let Some(missing) = names.iter().find(empty) {
            assert!(start.elapsed() < PATIENCE, "no {missing}");
            sleep(Duration::from_millis(5));
        }
    }
}

/// Starts a command and reads what it says.
pub fn begin(mut command: Command) -> Job {
    let mut child = command.spawn().unwrap();
    fn text(mut stream: impl Read + Send + 'static) -> JoinHandle<String> {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).unwrap();
            String::from_utf8_lossy(&bytes).into_owned()
        })
    }
    let texts = [text(child.stdout.take().unwrap()), text(child.stderr.take().unwrap())];
    Job { child, texts: Some(texts) }
}

/// Whether a process runs.
pub fn runs(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
}

/// Fails if a process still runs after some seconds.
pub fn gone(pid: &str) {
    let start = Instant::now();
    while runs(pid) {
        assert!(start.elapsed() < Duration::from_secs(10), "process {pid} still runs");
        sleep(Duration::from_millis(5));
    }
}

/// A port of this machine that nobody listens on, and no other test is given, below those that the system gives out.
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let next = || 20_000 + ((std::process::id() * 37 + NEXT.fetch_add(1, Ordering::SeqCst)) % 10_000) as u16;
    let free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    std::iter::repeat_with(next).take(10_000).find(free).expect("a free port")
}
