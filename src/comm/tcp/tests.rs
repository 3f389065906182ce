use super::*;
use crate::{
    backend::{Tensor, cpu::Cpu},
    comm::{
        environment::Master,
        store::{Client, Server},
        threads::Threads,
    },
    rng::Stream as Random,
};

const SOON: Duration = Duration::from_secs(20);

/// Ranks that are connected through a store.
fn trees(world: usize, timeout: Duration) -> Vec<Tree> {
    let server = Server::start("127.0.0.1:0", "run").unwrap();
    let endpoint = server.address().to_string();
    thread::scope(|scope| {
        let connect = |rank| {
            let world = member(rank, world, &endpoint);
            scope.spawn(move || Tree::connect(&world, &world.meet(SOON).unwrap(), timeout).unwrap())
        };
        let ranks: Vec<_> = (0..world).map(connect).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn member(rank: usize, world: usize, endpoint: &str) -> World {
    let master = Master::Launcher(endpoint.into());
    World { rank, world, local_rank: rank, local_world: world, master, token: "run".into(), ..World::alone() }
}

fn said<T>(result: Result<T>) -> String {
    result.err().expect("an error").to_string()
}

/// What a rank sums: numbers of many magnitudes, so that another order of addition shows.
fn values(rank: usize, count: usize) -> Vec<f64> {
    let mut random = Random::new(rank as u64, "values").rng();
    (0..count).map(|_| (random.uniform() - 0.5) * f64::powi(10.0, random.below(12) as i32 - 6)).collect()
}

/// What becomes of some tensors, all under way at once; each with its rank's values, as bits.
fn together<C: Comm<Cpu<f64>>>(comm: &C, all: &[(usize, Collective)]) -> Vec<Vec<u64>> {
    let backend = Cpu::<f64>::new(1).unwrap();
    let fill = |&(count, _): &(usize, _)| {
        let bytes: Vec<u8> = values(comm.rank(), count).into_iter().flat_map(f64::to_le_bytes).collect();
        Tensor::from_bytes(&backend, DType::F64, &bytes).unwrap()
    };
    let mut tensors: Vec<_> = all.iter().map(fill).collect();
    let begin = |(tensor, (_, what)): (&mut Tensor<_>, &(usize, Collective))| {
        comm.begin(&backend, Stream::Communication, *what, tensor.view_mut()).unwrap()
    };
    let tickets: Vec<_> = tensors.iter_mut().zip(all).map(begin).collect();
    let finish = |(tensor, ticket): (&mut Tensor<_>, _)| {
        comm.finish(&backend, Stream::Communication, ticket, tensor.view_mut()).unwrap();
        let mut host = backend.host(tensor.len() * 8).unwrap();
        backend.download(Stream::Compute, tensor.view(), &mut host, 0);
        host.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect()
    };
    tensors.iter_mut().zip(tickets).map(finish).collect()
}

/// Sums tensors; what goes to one rank, or comes from one, is checked beside it.
fn sums<C: Comm<Cpu<f64>>>(comm: &C) -> Vec<Vec<u64>> {
    let found = together(comm, &[3, 40_000, 0, 1].map(|count| (count, Collective::Sum)));
    let both =
        |rank| [(3, Collective::SumTo(rank)), (40_000, Collective::CopyFrom(rank)), (1, Collective::SumTo(rank))];
    let to_one: Vec<_> = (0..comm.world()).flat_map(both).collect();
    for (rank, of_rank) in together(comm, &to_one).chunks(3).enumerate() {
        let copied: Vec<_> = values(rank, 40_000).into_iter().map(f64::to_bits).collect();
        assert!(of_rank[1] == copied, "rank {} copies from {rank}", comm.rank());
        let summed = of_rank[0] == found[0] && of_rank[2] == found[3];
        assert!(summed || rank != comm.rank(), "rank {rank} has another sum than all have together");
    }
    let all = comm.exchange(&vec![b'x'; comm.rank()]).unwrap();
    assert!(all.iter().enumerate().all(|(rank, said)| said.len() == rank) && all.len() == comm.world());
    found
}

#[test]
fn children_are_those_that_halving_gives() {
    assert_eq!([0, 1, 2, 3].map(|rank| children(rank, 4)), [vec![1, 2], vec![], vec![3], vec![]]);
    for world in 1..40 {
        let mut all: Vec<_> = (0..world).flat_map(|rank| children(rank, world)).collect();
        all.sort_unstable();
        assert_eq!(all, (1..world).collect::<Vec<_>>(), "each rank but 0 has one parent");
    }
}

#[test]
fn sums_are_those_of_threads_bit_for_bit() {
    for world in [1, 2, 3, 4, 5, 8] {
        let expected = thread::scope(|scope| {
            let ranks = Threads::group(world).into_iter().map(|comm| scope.spawn(move || sums(&comm)));
            ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().unwrap()).next().unwrap()
        });
        thread::scope(|scope| {
            let ranks: Vec<_> =
                trees(world, SOON).into_iter().map(|t| scope.spawn(|| sums(&Tcp::new(t).unwrap()))).collect();
            for rank in ranks {
                assert!(rank.join().unwrap() == expected, "{world} ranks");
            }
        });
    }
}

#[test]
fn the_loss_of_a_rank_is_told_to_all_at_once() {
    for lost in 0..5 {
        let mut trees = trees(5, SOON);
        drop(trees.remove(lost));
        let start = Instant::now();
        thread::scope(|scope| {
            let ranks: Vec<_> = trees.into_iter().map(|t| scope.spawn(move || said(exchange(t)))).collect();
            for rank in ranks {
                let message = rank.join().unwrap();
                assert!(message.contains(&format!("rank {lost} is lost")), "{message}");
            }
        });
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    }
}

fn exchange(tree: Tree) -> Result<Vec<Vec<u8>>> {
    Comm::<Cpu<f64>>::exchange(&Tcp::<Cpu<f64>>::new(tree)?, b"")
}

#[test]
fn a_rank_that_hangs_is_named_and_one_that_waits_is_not() {
    let timeout = Duration::from_millis(400);
    for hangs in 0..4 {
        let mut trees = trees(4, timeout);
        let hanging = trees.remove(hangs);
        let start = Instant::now();
        thread::scope(|scope| {
            let ranks: Vec<_> = trees.into_iter().map(|t| scope.spawn(move || said(exchange(t)))).collect();
            for rank in ranks {
                let message = rank.join().unwrap();
                assert!(message.contains(&format!("rank {hangs} is lost: nothing was heard")), "{message}");
            }
        });
        assert!(start.elapsed() >= timeout && start.elapsed() < SOON);
        drop(hanging);
    }
}

#[test]
fn a_slow_rank_is_waited_for_within_the_timeout() {
    // Rank 3 comes after several timeouts' worth of waiting by others, none of which is longer than one.
    let timeout = Duration::from_millis(1500);
    thread::scope(|scope| {
        for (rank, tree) in trees(4, timeout).into_iter().enumerate() {
            scope.spawn(move || {
                let comm = Tcp::<Cpu<f64>>::new(tree).unwrap();
                for _ in 0..3 {
                    thread::sleep(Duration::from_millis(if rank == 3 { 700 } else { 0 }));
                    Comm::<Cpu<f64>>::exchange(&comm, b"").unwrap();
                }
            });
        }
    });
}

#[test]
fn who_leaves_says_why() {
    thread::scope(|scope| {
        for (rank, tree) in trees(4, SOON).into_iter().enumerate() {
            scope.spawn(move || {
                let comm = Tcp::<Cpu<f64>>::new(tree).unwrap();
                if rank == 2 {
                    return Comm::<Cpu<f64>>::leave(&comm, "rank 2 ended: the disk is full");
                }
                let message = said(Comm::<Cpu<f64>>::exchange(&comm, b""));
                assert!(message == "rank 2 ended: the disk is full", "{message}");
                // And so does all that comes later.
                assert_eq!(said(Comm::<Cpu<f64>>::exchange(&comm, b"x")), message);
            });
        }
    });
}

#[test]
fn ranks_that_are_missing_or_do_not_fit_are_named() {
    let server = Server::start("127.0.0.1:0", "run").unwrap();
    let endpoint = server.address().to_string();
    let connect = |world: &World, timeout| Tree::connect(world, &world.meet(SOON).unwrap(), timeout).err().unwrap();
    let missing = connect(&member(1, 3, &endpoint), Duration::from_millis(50)).to_string();
    assert!(missing.contains("ranks 0, 2 of 3 missing"), "{missing}");
    // The next start of the same run is another round.
    let again = |round: &str, rank, world| World { round: round.into(), ..member(rank, world, &endpoint) };
    thread::scope(|scope| {
        let waits = scope.spawn(|| connect(&again("1", 0, 3), SOON));
        // Until the other one is there.
        let client = Client::connect(&endpoint, "run", SOON).unwrap();
        client.get("round/1/address/0", SOON).unwrap();
        let error = connect(&again("1", 1, 2), SOON).to_string();
        assert!(error.contains("world size = 2") && error.contains("others for 3"), "{error}");
        assert!(matches!(waits.join().unwrap(), Error::Elsewhere { code: 2 }));
    });
    thread::scope(|scope| {
        let waits = scope.spawn(|| connect(&again("2", 0, 3), SOON));
        let client = Client::connect(&endpoint, "run", SOON).unwrap();
        client.get("round/2/address/0", SOON).unwrap();
        let error = connect(&again("2", 0, 3), SOON).to_string();
        assert!(error.contains("rank = 0") && error.contains("twice"), "{error}");
        assert!(matches!(waits.join().unwrap(), Error::Elsewhere { code: 2 }));
    });
}

#[test]
fn strangers_do_not_disturb() {
    let server = Server::start("127.0.0.1:0", "run").unwrap();
    let endpoint = server.address().to_string();
    thread::scope(|scope| {
        let [first, second] = [0, 1].map(|rank| member(rank, 2, &endpoint));
        let rank0 = scope.spawn(move || {
            let tree = Tree::connect(&first, &first.meet(SOON).unwrap(), SOON).unwrap();
            tree.exchange(b"0").unwrap()
        });
        let address = Client::connect(&endpoint, "run", SOON).unwrap().get("round/0/address/0", SOON).unwrap();
        let address = String::from_utf8(address).unwrap();
        for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[255; 4], &[0; 4]] {
            io::Write::write_all(&mut TcpStream::connect(&address).unwrap(), bytes).unwrap();
        }
        write_frame(&mut TcpStream::connect(&address).unwrap(), 0, &[MAGIC, b"yesterday", &1usize.to_le_bytes()])
            .unwrap();
        let tree = Tree::connect(&second, &second.meet(SOON).unwrap(), SOON).unwrap();
        assert_eq!(tree.exchange(b"1").unwrap(), [b"0", b"1"]);
        assert_eq!(rank0.join().unwrap(), [b"0", b"1"]);
    });
}
