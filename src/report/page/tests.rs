use super::*;
use crate::report::metrics::{SampleRecord, ValidationRecord};
use serde_json::Value;

fn step(step: u64) -> Record {
    Record::Step(StepRecord {
        step,
        tokens: step * 512,
        loss: 4.0 - step as f64 * 1e-4,
        lr: 1e-3,
        grad_norm: 0.5,
        update_norm: 0.0625,
        tokens_per_second: 45_000.0,
        seconds: step as f64 * 0.5,
        memory: 1 << 20,
    })
}

fn run(steps: u64) -> Run {
    let mut records: Vec<Record> = (1..=steps).map(step).collect();
    for (at, loss) in [(steps / 2, 3.5), (steps, 3.75)] {
        records.push(Record::Validation(ValidationRecord { step: at, tokens: 7, loss, batches: 1, seconds: 9.0 }));
    }
    Run { name: "base".into(), records, flops_per_token: Some(1e6), ..Run::default() }
}

/// The page's numbers.
fn data(page: &str) -> Value {
    let (_, after) = page.split_once(r#"id="data">"#).unwrap();
    serde_json::from_str(after.split_once("</script>").unwrap().0).unwrap()
}

#[test]
fn the_page_holds_the_curves_and_their_summary() {
    let page = render("one", &[run(10)]);
    let run = &data(&page)[0];
    assert_eq!(run["train"]["step"].as_array().unwrap().len(), 10);
    assert_eq!(run["train"]["loss"][9], 3.999);
    assert_eq!(run["validation"]["loss"], serde_json::json!([3.5, 3.75]));
    assert_eq!((&run["best"], &run["last"], &run["tokens"]), (&3.5.into(), &3.75.into(), &5120.into()));
    assert_eq!(run["flops"], 5120.0 * 1e6);
    assert!(!page.contains("{{"), "a part was left out");
}

#[test]
fn a_long_run_is_thinned_and_keeps_its_end() {
    let page = render("long", &[run(100_000)]);
    let train = &data(&page)[0]["train"];
    let steps = train["step"].as_array().unwrap();
    assert_eq!(steps.len(), MOST_POINTS);
    assert_eq!(steps[MOST_POINTS - 1], 100_000);
    // Of steps 1 to 50.
    assert_eq!(train["loss"][0], 4.0 - 25.5e-4);
    assert!(page.len() < 500_000, "{}", page.len());
}

#[test]
fn nothing_that_a_run_holds_leaves_its_place() {
    let evil = "</script><script>alert(1)</script>{{style}}<!--";
    let mut run = run(2);
    run.name = evil.into();
    run.settings.insert(evil.into(), evil.into());
    run.samples.push(Sample { step: None, prompt: evil.into(), text: evil.into() });
    let page = render(evil, &[run]);
    assert!(!page.contains("<script>alert"));
    assert_eq!(page.matches("color-scheme: light dark").count(), 1, "a part was looked at for names");
    assert_eq!(data(&page)[0]["samples"][0]["text"], evil);
}

/// Those of the run stand before those that were written apart from it; of very many the newest stay.
#[test]
fn texts_of_a_run_are_shown() {
    let written = |step: u64| {
        let (prompt, text) = ("a".into(), step.to_string());
        Record::Sample(SampleRecord { step, tokens: 7, seconds: 9.0, index: 0, prompt, text })
    };
    let apart = Sample { step: None, prompt: "b".into(), text: "c".into() };
    let texts = |count: u64| {
        let records = (1..=count).flat_map(|i| [step(i), written(i)]).collect();
        let page = render("texts", &[Run { records, samples: vec![apart.clone()], ..Run::default() }]);
        data(&page)[0]["samples"].as_array().unwrap().clone()
    };
    let few = texts(2);
    assert_eq!(few[1], serde_json::json!({"step": 2, "prompt": "a", "text": "2"}));
    assert_eq!(few[2], serde_json::json!({"prompt": "b", "text": "c"}));
    let many = texts(1000);
    assert_eq!((many.len(), &many[0]["text"]), (MOST_SAMPLES + 1, &"801".into()));
}

#[test]
fn what_is_not_finite_is_null() {
    let Record::Step(bad) = step(1) else { unreachable!() };
    let bad = Run { records: vec![Record::Step(StepRecord { loss: f64::NAN, ..bad })], ..Run::default() };
    let page = render("bad", &[bad, Run::default()]);
    let runs = data(&page);
    assert!(runs[0]["train"]["loss"][0].is_null() && runs[0]["loss"].is_null());
    assert_eq!(runs[1]["train"]["loss"], serde_json::json!([]));
}

#[test]
fn the_page_fetches_nothing() {
    let page = render("alone", &[run(3)]);
    // The one address is the name of a namespace, of which nothing is fetched.
    let addresses = page.match_indices("http").map(|(at, _)| &page[at..at + 26]);
    assert!(addresses.clone().all(|a| a == "http://www.w3.org/2000/svg" || a.starts_with("http-equiv")));
    assert_eq!(addresses.count(), 2);
    assert!(page.contains("default-src 'none'"));
}
