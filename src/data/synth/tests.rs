use super::*;
#[test]
fn print_some() {
    let synth = Synth::new(1);
    for i in 0..4 {
        let d = synth.document(i);
        println!("{}\n{} {:?}\n", d.text, d.nats, synth.score(&d.text));
    }
    let mut out = Vec::new();
    let t = std::time::Instant::now();
    let stats = synth.write_corpus(&mut out, 0, 20_000_000, CorpusFormat::Text).unwrap();
    println!(
        "{} MB/s {} docs, {} nats/byte",
        20.0 / t.elapsed().as_secs_f64(),
        stats.document_nats.len(),
        stats.document_nats.iter().sum::<f64>() / stats.bytes as f64
    );
    let t = std::time::Instant::now();
    Synth::new(2);
    println!("new {:?}", t.elapsed());
    if let Ok(path) = std::env::var("SYNTH_OUT") {
        std::fs::write(path, &out).unwrap();
    }
}
