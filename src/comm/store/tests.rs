use super::*;
use crate::Error;
use std::{
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

const SOON: Duration = Duration::from_secs(10);

fn pair() -> (Server, Client) {
    let server = Server::start("127.0.0.1:0", "run").unwrap();
    let client = client(&server);
    (server, client)
}

fn client(server: &Server) -> Client {
    Client::connect(&server.address().to_string(), "run", SOON).unwrap()
}

fn said<T>(result: crate::Result<T>) -> String {
    result.err().expect("an error").to_string()
}

#[test]
fn values_are_set_seen_swapped_and_removed() {
    let (server, one) = pair();
    let other = client(&server);
    assert_eq!(one.look("a").unwrap(), None);
    one.set("a", b"x").unwrap();
    assert_eq!(other.look("a").unwrap().unwrap(), b"x");
    assert_eq!(other.compare_and_set("a", Some(b"y"), b"z").unwrap(), (false, Some(b"x".to_vec())));
    assert_eq!(other.compare_and_set("a", None, b"z").unwrap(), (false, Some(b"x".to_vec())));
    assert_eq!(other.compare_and_set("a", Some(b"x"), b"z").unwrap(), (true, Some(b"z".to_vec())));
    assert_eq!(other.compare_and_set("b", None, b"").unwrap(), (true, Some(vec![])));
    one.set("c/1", b"").unwrap();
    one.set("c/2", b"").unwrap();
    assert_eq!(other.keys("c/").unwrap(), ["c/1", "c/2"]);
    assert!(one.delete("a").unwrap() && !other.delete("a").unwrap());
    assert!(said(one.add("c/1", 1)).contains("c/1 holds no number"));
    assert_eq!(one.add("d", -3).unwrap(), -3, "a refused request does not end the connection");
}

#[test]
fn counters_count_every_call() {
    let (server, one) = pair();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let client = client(&server);
                (0..250).for_each(|_| assert!(client.add("n", 1).unwrap() > 0));
            });
        }
    });
    assert_eq!(one.add("n", 0).unwrap(), 1000);
}

#[test]
fn waiting_ends_with_the_value_or_the_time() {
    let (server, one) = pair();
    let start = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(100));
            client(&server).set("late", b"v").unwrap();
        });
        assert_eq!(one.get("late", SOON).unwrap(), b"v");
    });
    assert!(start.elapsed() < Duration::from_secs(5), "the value ends the wait, not the time");
    let message = said(one.get("never", Duration::from_millis(50)));
    assert!(message.contains("`never`"), "{message}");
    let start = Instant::now();
    let keys = ["late".to_string(), "x".into(), "y".into()];
    assert_eq!(one.wait(&keys, Duration::from_millis(50)).unwrap(), ["x", "y"]);
    assert!(start.elapsed() < Duration::from_millis(900), "short times are kept");
}

#[test]
fn a_barrier_names_who_is_missing() {
    let (server, one) = pair();
    thread::scope(|scope| {
        for rank in 1..4 {
            let client = client(&server);
            scope.spawn(move || client.barrier("start", rank, 4, SOON).unwrap());
        }
        one.barrier("start", 0, 4, SOON).unwrap();
    });
    client(&server).set("barrier/end/2", b"").unwrap();
    let message = said(one.barrier("end", 0, 4, Duration::from_millis(100)));
    assert!(message.contains("ranks 1, 3 missing at `end`"), "{message}");
}

#[test]
fn a_lease_ends_with_its_connection_or_with_silence() {
    let (server, one) = pair();
    let lease = one.lease("alive/1", b"me", SOON).unwrap();
    assert_eq!(one.look("alive/1").unwrap().unwrap(), b"me");
    let message = said(client(&server).lease("alive/1", b"you", SOON));
    assert!(message.contains("alive/1 is held by another"), "{message}");
    drop(lease);
    assert_eq!(one.watch("alive/1", Some(b"me"), SOON).unwrap(), None);

    // Silent, but connected: the time of the lease ends it. Heartbeats carry it past that time.
    let silent = client(&server);
    silent.ask_for_lease("alive/2", b"", Duration::from_millis(300)).unwrap();
    let kept = one.lease("alive/3", b"", Duration::from_millis(300)).unwrap();
    let start = Instant::now();
    assert_eq!(one.watch("alive/2", Some(b""), SOON).unwrap(), None);
    assert!(start.elapsed() > Duration::from_millis(200));
    thread::sleep(Duration::from_millis(600));
    assert!(one.look("alive/3").unwrap().is_some() && !kept.lost());
    drop(server);
    let start = Instant::now();
    while !kept.lost() {
        assert!(start.elapsed() < SOON, "the lease does not know that the store is gone");
        thread::sleep(Duration::from_millis(10));
    }
    assert!(matches!(one.look("alive/3"), Err(Error::Fault(_))));
}

#[test]
fn clients_of_other_runs_and_wrong_places_are_refused() {
    let (server, _one) = pair();
    let endpoint = server.address().to_string();
    let message = said(Client::connect(&endpoint, "yesterday", SOON));
    assert!(message.contains("yesterday") && message.contains("stale rendezvous id"), "{message}");
    let message = said(Server::start(&endpoint, "run"));
    assert!(message.contains(&endpoint) && message.contains("in use"), "{message}");
    // 192.0.2.0/24 is for documentation (RFC 5737): nobody has such an address.
    assert!(said(Server::start("192.0.2.1:0", "run")).contains("no address of this machine"));
    let message = said(Client::connect("no-such-host.invalid:1", "run", Duration::from_millis(10)));
    assert!(message.contains("no-such-host.invalid:1") && message.contains("does not resolve"), "{message}");
    drop(server);
    let message = said(Client::connect(&endpoint, "run", Duration::from_millis(100)));
    assert!(message.contains("no store answers"), "{message}");
}

#[test]
fn hostile_bytes_cut_off_their_sender_only() {
    let (server, one) = pair();
    let hello = |stream: &mut TcpStream| {
        write_frame(stream, 0, &[MAGIC, b"run"]).unwrap();
        assert_eq!(read_frame(stream, MAX_FRAME).unwrap().kind, answer::DONE);
    };
    let huge = u32::MAX.to_le_bytes().to_vec();
    let field_past_end = [10u32.to_le_bytes().as_slice(), &[ask::SET], &100u32.to_le_bytes(), b"short"].concat();
    let half_a_length = [3u32.to_le_bytes().as_slice(), &[ask::SET, 0, 0]].concat();
    for bytes in [&huge, &field_past_end, &half_a_length, &b"GET / HTTP/1.1\r\n\r\n".to_vec(), &vec![0; 64]] {
        for greeted in [false, true] {
            let mut stream = TcpStream::connect(server.address()).unwrap();
            stream.set_read_timeout(Some(SOON)).unwrap();
            if greeted {
                hello(&mut stream);
            }
            io::Write::write_all(&mut stream, bytes).unwrap();
            let mut rest = Vec::new();
            // A reset is an end as well.
            let end = io::Read::read_to_end(&mut stream, &mut rest);
            assert!(end.is_ok() || end.unwrap_err().kind() == io::ErrorKind::ConnectionReset, "{bytes:?}");
        }
    }
    let mut stream = TcpStream::connect(server.address()).unwrap();
    hello(&mut stream);
    let long = vec![b'k'; MAX_KEY + 1];
    let odd: [(u8, &[&[u8]]); 6] = [
        (ask::SET, &[b"key"]),
        (ask::SET, &[&long, b""]),
        (ask::LOOK, &[b"\xff"]),
        (ask::ADD, &[b"n", b"1"]),
        (ask::SWAP, &[b"a", b"b", b"c", b"d"]),
        (200, &[]),
    ];
    for (kind, fields) in odd {
        write_frame(&mut stream, kind, fields).unwrap();
        assert_eq!(read_frame(&mut stream, MAX_FRAME).unwrap().kind, answer::REFUSED, "{kind}");
    }
    assert!(write_frame(&mut stream, ask::SET, &[b"k", &vec![0; MAX_FRAME]]).is_err());
    one.set("still", b"here").unwrap();
    assert_eq!(one.keys("").unwrap(), ["still"]);
}

#[test]
fn frames_come_back_as_they_went() {
    let mut bytes = Vec::new();
    write_frame(&mut bytes, 7, &[b"", b"abc"]).unwrap();
    assert_eq!(read_frame(&mut &bytes[..], 64).unwrap(), Frame { kind: 7, fields: vec![vec![], b"abc".to_vec()] });
    for end in 0..bytes.len() {
        assert!(read_frame(&mut &bytes[..end], 64).is_err(), "{end} bytes");
    }
    assert!(read_frame(&mut &bytes[..], bytes.len() - 5).is_err());
}
