//! torchrun's options, and what is refused before anything starts.

use crate::job::{Place, begin, free_port};
use std::{fs, net::TcpListener, process::Command};

const VARIABLES: &str = "echo $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $GROUP_RANK $GROUP_WORLD_SIZE \
    $ROLE_RANK $ROLE_WORLD_SIZE $ROLE_NAME $MASTER_ADDR $TORCHELASTIC_RUN_ID $TORCHELASTIC_RESTART_COUNT \
    $TORCHELASTIC_MAX_RESTARTS $OMP_NUM_THREADS ${CUDA_VISIBLE_DEVICES:-unset} $((MASTER_PORT > 0))";

#[test]
fn processes_get_the_variables_of_torchrun() {
    let place = Place::new();
    let said = place.run("--standalone --nproc_per_node=2 --rdzv-id job --max-restarts=4 --role worker", VARIABLES);
    said.expect(0, &["OMP_NUM_THREADS=1", "2 processes"]);
    let line = |rank: usize| format!("[rank {rank}] {rank} 2 {rank} 2 0 1 {rank} 2 worker 127.0.0.1 job 0 4 1 unset 1");
    assert_eq!(said.lines(), [line(0), line(1)]);
    // What the user set stays; one process has all threads, and no prefix.
    let mut command = place.command("--no_python", "echo $OMP_NUM_THREADS $CUDA_VISIBLE_DEVICES");
    let said = begin({
        command.env("OMP_NUM_THREADS", "3").env("CUDA_VISIBLE_DEVICES", "-1");
        command
    });
    assert_eq!(said.end().out, "3 -1\n");
    assert_eq!(place.run("", "echo ${OMP_NUM_THREADS:-unset}").out, "unset\n");
}

#[test]
fn every_option_of_torchrun_is_taken_in_all_its_forms() {
    let place = Place::new();
    let ours = "--nnodes=1 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=localhost:PORT --rdzv-id=a \
                --rdzv-conf=join_timeout=5,timeout=3 --max-restarts=1 --monitor-interval=0.05 --start-method=spawn \
                --event-log-handler=null --role=r --no-python --redirects=0 --tee=0 --local-ranks-filter=0 \
                --node-rank=0 --master-addr=127.0.0.1 --master-port=PORT --local-addr=127.0.0.1 \
                --signals-to-handle=SIGTERM,USR1 --grace=5 --bind=none";
    let ours = ours.replace("PORT", &free_port().to_string());
    let underscores = ours.split_whitespace().map(|option| {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let value = if value.is_empty() { String::new() } else { format!("={value}") };
        format!("--{}{value} ", name[2..].replace('-', "_"))
    });
    for line in [ours.clone(), underscores.collect()] {
        place.run(&line, "true").expect(0, &["1 processes"]);
    }
    // By the environment, as Kubeflow does it; the command line wins.
    let mut command = place.command("--nproc-per-node 2", "echo $WORLD_SIZE $MASTER_PORT");
    let port = free_port();
    for (name, value) in
        [("NNODES", "1"), ("NPROC_PER_NODE", "3"), ("NODE_RANK", "0"), ("MASTER_PORT", &port.to_string())]
    {
        command.env(format!("PET_{name}"), value);
    }
    command.env("PET_STANDALONE", "0").env("PET_NO_PYTHON", "1");
    assert_eq!(begin(command).end().lines(), [format!("[rank 0] 2 {port}"), format!("[rank 1] 2 {port}")]);
    // What comes after the program is the program's.
    let said = place.run("--nproc-per-node 1 echo --nproc-per-node 7 -m --help", "");
    assert_eq!(said.out, "--nproc-per-node 7 -m --help sh -c \n".replace(" sh -c ", ""));
}

#[test]
fn what_cannot_be_meant_is_refused_in_words() {
    let place = Place::new();
    place.write("train.py", "");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().port();
    let in_use = format!("--nnodes 2 --node-rank 0 --master-addr 127.0.0.1 --master-port {taken}");
    let cases: [(&str, &[&str]); 21] = [
        ("-m", &["Python", "-m MODULE"]),
        ("--run-path", &["Python"]),
        ("--nnodes 0", &["--nnodes", "MIN:MAX"]),
        ("--nnodes 3:2", &["--nnodes", "MIN:MAX"]),
        ("--nproc-per-node many", &["--nproc-per-node", "gpu, cpu or auto"]),
        ("--nproc-per-node 0", &["--nproc-per-node"]),
        ("--nproc-per-node gpu", &["--nproc-per-node = gpu", "no GPU"]),
        ("--standalone --nnodes 2", &["--standalone means one node"]),
        ("--node-rank 1", &["--node-rank 1", "one node"]),
        ("--nnodes 2", &["--node-rank is missing"]),
        ("--nnodes 2 --node-rank 0", &["--master-addr is missing"]),
        ("--nnodes 2 --node-rank 2 --master-addr localhost", &["--node-rank 2", "from 0 to 1"]),
        ("--nnodes 1:2", &["--nnodes 1:2", "--rdzv-endpoint"]),
        ("--nnodes 2 --rdzv-backend c10d", &["--rdzv-endpoint is missing"]),
        ("--nnodes 2 --rdzv-endpoint host:port", &["--rdzv-endpoint host:port"]),
        ("--rdzv-backend etcd-v2", &["etcd-v2", "static or c10d"]),
        ("--rdzv-conf color=red", &["color is unknown"]),
        ("--signals-to-handle SIGKILL", &["SIGKILL", "SIGTERM"]),
        ("--nproc-per-nod 2", &["--nproc-per-nod", "--nproc-per-node"]),
        (
            "--nnodes 2 --node-rank 0 --rdzv-conf join_timeout=0.1 --master-addr no-such-host.invalid",
            &["no-such-host.invalid", "does not resolve"],
        ),
        (&in_use, &["the port is in use"]),
    ];
    for (options, parts) in cases {
        place.run(options, "echo started > started").expect(2, parts);
    }
    // 192.0.2.0/24 is for documentation (RFC 5737): nobody has such an address.
    let elsewhere = "--nnodes 2 --node-rank 0 --master-addr 192.0.2.1";
    place.run(elsewhere, "echo started > started").expect(2, &["192.0.2.1 is no address of this node", "--local-addr"]);
    place.run("./train.py --lr 1", "").expect(2, &["./train.py", "python -u"]);
    place.run("no-such-program", "").expect(2, &["no-such-program", "not found"]);
    assert!(!place.has("started"), "nothing is started before all is right");
}

#[test]
fn a_port_in_use_is_replaced() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let said = Place::new().run(&format!("--standalone --master-port {port}"), "echo $MASTER_PORT");
    said.expect(0, &[&format!("port {port} is in use")]);
    assert_ne!(said.out.trim(), port.to_string());
    assert!(said.out.trim().parse::<u16>().is_ok());
}

/// A stand-in for the driver that shows some GPUs.
const DRIVER: &str = "int cuInit(unsigned f) { return 0; }\n\
                      int cuDriverGetVersion(int *v) { *v = 13000; return 0; }\n\
                      int cuDeviceGetCount(int *n) { *n = 2; return 0; }\n";

#[test]
fn more_processes_than_gpus_are_refused() {
    let place = Place::new();
    place.write("driver.c", DRIVER);
    let library = place.path().join("libcuda.so.1");
    let cc = std::env::var("CC").unwrap_or("cc".into());
    let source = place.path().join("driver.c");
    let built = Command::new(cc).args(["-shared", "-fPIC", "-o"]).args([&library, &source]).status().unwrap();
    assert!(built.success());
    fs::copy(&library, place.path().join("libcuda.so")).unwrap();
    let run = |options: &str, visible: Option<&str>| {
        let mut command = place.command(options, "echo $WORLD_SIZE");
        command.env("LD_LIBRARY_PATH", place.path()).env_remove("CUDA_VISIBLE_DEVICES");
        visible.map(|list| command.env("CUDA_VISIBLE_DEVICES", list));
        begin(command).end()
    };
    run("--nproc-per-node 3", None)
        .expect(2, &["--nproc-per-node = 3", "more processes than GPUs: 2", "--oversubscribe"]);
    for (options, world) in [("gpu", 2), ("auto", 2), ("2", 2), ("1", 1), ("3 --oversubscribe", 3)] {
        let said = run(&format!("--nproc-per-node {options}"), None);
        assert_eq!((said.out.lines().count(), said.code), (world, 0), "{options}: {}", said.err);
    }
    // Whoever hides the GPUs wants none.
    assert_eq!(run("--nproc-per-node 3", Some("")).out.lines().count(), 3);
}
