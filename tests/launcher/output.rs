//! What processes print: prefixes, logs, filters, whole lines.

use crate::job::Place;
use std::collections::BTreeMap;

#[test]
fn lines_stay_whole_and_bear_their_rank() {
    let script = "i=0; while [ $i -lt 300 ]; do printf '%s:%s:' $RANK $i; printf '%0200d\\n' $i; i=$((i+1)); done; \
                  printf 'end of %s' $RANK";
    let said = Place::new().run("--nproc-per-node 4", script);
    assert_eq!(said.code, 0, "{}", said.err);
    let mut next: BTreeMap<usize, usize> = BTreeMap::new();
    let mut ends = 0;
    for line in said.out.lines() {
        let (rank, text) = line.strip_prefix("[rank ").and_then(|line| line.split_once("] ")).expect(line);
        if text == format!("end of {rank}") {
            ends += 1;
            continue;
        }
        let at = next.entry(rank.parse().unwrap()).or_default();
        assert_eq!(text, format!("{rank}:{at}:{at:0200}"));
        *at += 1;
    }
    assert_eq!((ends, next.into_values().collect::<Vec<_>>()), (4, vec![300; 4]));
}

#[test]
fn streams_go_where_they_are_asked_to() {
    let script = "echo out$RANK; echo err$RANK >&2";
    let place = Place::new();
    // Options, files that hold the stream, and what the console shows.
    let both = ["0/stderr", "0/stdout", "1/stderr", "1/stdout"];
    let cases: [(&str, &[&str], &str); 7] = [
        ("", &[], "out0 out1 err0 err1"),
        ("--log-dir a", &both, "out0 out1 err0 err1"),
        ("--log-dir b --redirects 3", &both, ""),
        ("--log-dir c --tee 3 --local-ranks-filter 1", &both, "out1 err1"),
        ("--log-dir d -r 0:1,1:2", &["0/stdout", "1/stderr"], "out1 err0"),
        ("--log-dir e -t 1", &["0/stdout", "1/stdout"], "out0 out1 err0 err1"),
        ("--log-dir f -r 1 -t 0:1", &["0/stdout", "1/stdout"], "out0 err0 err1"),
    ];
    for (options, files, shown) in cases {
        let said = place.run(&format!("--nproc-per-node 2 --rdzv-id run {options}"), script);
        assert_eq!(said.code, 0, "{}", said.err);
        for stream in ["out", "err"] {
            let text = if stream == "out" { &said.out } else { &said.err };
            for rank in 0..2 {
                let line = format!("{stream}{rank}");
                let seen = text.lines().any(|l| l == format!("[rank {rank}] {line}"));
                assert_eq!(seen, shown.split(' ').any(|word| word == line), "{options}: {line} on the console");
                let name = format!("{rank}/std{stream}");
                let dir = options.split(' ').nth(1).unwrap_or("none");
                let file = format!("{dir}/run/attempt_0/{name}.log");
                assert_eq!(place.has(&file), files.contains(&name.as_str()), "{options}: {file}");
                if place.has(&file) {
                    assert_eq!(place.read(&file), format!("{line}\n"));
                }
            }
        }
    }
}
