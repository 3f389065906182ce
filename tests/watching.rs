//! Looking at runs: the report in a real browser, the screen, TensorBoard's files; and what a model is asked.

mod command;

use command::{
    Place, essence,
    ranks::{end, start_ranks},
};
use serde_json::{Value, json};
use std::process::{Command, Stdio};

/// A browser that can run without a screen: `MUPSCALE_BROWSER`, or one by a usual name.
fn browser() -> Option<String> {
    let named = std::env::var("MUPSCALE_BROWSER").ok();
    let usual = ["chromium", "chromium-browser", "google-chrome", "chrome"].map(String::from);
    named.into_iter().chain(usual).find(|name| {
        let asked = Command::new(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        asked.is_ok_and(|status| status.success())
    })
}

/// Two runs, one of which has samples.
fn two_runs() -> Place {
    let place = Place::new();
    place.ok("train -c run.toml --set run=runs/one --set validation.every=2");
    place.ok("train -c run.toml --set run=runs/two --set optimizer.lr=0.02");
    place.write("prompts.jsonl", "{\"prompt\": \"The <b>\"}\n\n{\"prompt\": \"\"}\n");
    let samples = place.ok("generate runs/two --prompts prompts.jsonl --tokens 8").out;
    place.write("runs/two/samples.jsonl", samples);
    place
}

/// What a browser makes of a page, with these flags; up to the page's own script, which stands behind what it draws.
fn drawn(browser: &str, place: &Place, page: &str, flags: &[&str]) -> String {
    let usual = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"];
    let page = format!("file://{}", place.join(page).display());
    let profile = format!("--user-data-dir={}", place.join("profile").display());
    let mut command = Command::new(browser);
    command.args(usual).args(flags).args([profile, page]).stdin(Stdio::null());
    let drawn = String::from_utf8(command.output().unwrap().stdout).unwrap();
    let (drawn, _) = drawn.split_once("<script").unwrap_or_else(|| panic!("no page: {drawn}"));
    drawn.to_string()
}

#[test]
fn a_browser_draws_the_report() {
    let place = two_runs();
    place.ok("report runs --out page.html --title A<B");
    place.refuses("report runs --out page.html", &["exists already"]);
    let Some(browser) = browser() else {
        let missing = "there is no Chromium here to open the page in (MUPSCALE_BROWSER names one)";
        assert!(std::env::var_os("MUPSCALE_REQUIRE_BROWSER").is_none(), "{missing}");
        eprintln!("skipped: {missing}");
        return;
    };
    let page = drawn(&browser, &place, "page.html", &[]);
    assert!(!page.contains("nothing to draw"), "{page}");
    // Six charts of two runs, and the held-out losses of both (each validates at its end).
    assert_eq!(page.matches("<polyline").count(), 6 * 2 + 2);
    for part in ["<h1>A&lt;B</h1>", ">optimizer.lr<", "The &lt;b&gt;", "4 of 4", ">FLOPs<"] {
        assert!(page.contains(part), "no {part} in {page}");
    }
    // The page tells how it looks: its background, its width, and the width that there is.
    let told = "<script>document.body.dataset.look = [getComputedStyle(document.body).backgroundColor, \
                document.documentElement.scrollWidth, innerWidth].join(' ')</script></body>";
    place.write("told.html", String::from_utf8(place.read("page.html")).unwrap().replace("</body>", told));
    let look = |flags: &[&str]| {
        let page = drawn(&browser, &place, "told.html", flags);
        let look = page.split_once("data-look=\"").unwrap_or_else(|| panic!("{page}")).1.split_once('"').unwrap().0;
        (look.to_string(), page)
    };
    let (light, page) = look(&["--window-size=1200,900"]);
    assert!(light.starts_with("rgb(246, 248, 250)") && page.contains("stroke=\"#0072b2\""), "{light}: {page}");
    let (dark, page) = look(&["--window-size=1200,900", "--force-dark-mode"]);
    assert!(dark.starts_with("rgb(13, 17, 23)") && page.contains("stroke=\"#56b4e9\""), "{dark}: {page}");
    let (phone, page) = look(&["--window-size=390,844"]);
    let widths: Vec<u32> = phone.rsplit(' ').take(2).map(|n| n.parse().unwrap()).collect();
    assert!(widths[0] <= 500 && widths[1] <= widths[0], "wider than the screen: {phone}");
    // Charts are drawn for the screen, not scaled down to it: so their text stays readable.
    let chart = page.split_once("viewBox=\"0 0 ").unwrap().1.split_once(' ').unwrap().0;
    assert!(chart.parse::<u32>().unwrap() < widths[0], "{chart} of {phone}");
}

#[test]
fn what_is_no_run_is_refused() {
    let place = two_runs();
    place.refuses("report data --out page.html", &["data", "metrics.jsonl"]);
    place.refuses("report absent --out page.html", &["absent"]);
    place.refuses("watch data", &["metrics.jsonl"]);
    place.refuses("watch runs/one --every 0", &["--every", "between"]);
    place.write("runs/one/samples.jsonl", "{}\n");
    place.refuses("report runs/one --out page.html", &["samples.jsonl", "line 1", "prompt"]);
}

#[test]
fn watch_shows_a_run_once_where_there_is_no_terminal() {
    let place = two_runs();
    let screen = place.ok("watch runs/one").out;
    assert!(screen.starts_with("one  step 4/4  100 %") && screen.contains("held-out loss"), "{screen}");
    assert!(screen.lines().count() < 24 && screen.lines().all(|line| line.chars().count() <= 80), "{screen}");
}

#[test]
fn a_resumed_run_goes_on_in_a_new_event_file() {
    let place = Place::new();
    let events = |run: &str| place.names(run).into_iter().filter(|n| n.starts_with("events.out.tfevents.")).count();
    place.ok("train -c run.toml --set run=r --set steps=2");
    place.ok("train -c run.toml --set run=r --force");
    assert_eq!(events("r"), 1, "what a run that was replaced wrote is gone");
    std::fs::remove_dir_all(place.join("r/checkpoints/step-00000004")).unwrap();
    place.ok("resume r");
    assert_eq!(events("r"), 2);
}

/// The texts of `[samples]` in a run's metrics: step, prompt, text.
fn written(place: &Place, run: &str) -> Vec<(u64, String, String)> {
    let text = String::from_utf8(place.read(&format!("{run}/metrics.jsonl"))).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let string = |value: &Value| value.as_str().unwrap().to_string();
    lines
        .filter(|line| line["kind"] == "sample")
        .map(|line| (line["step"].as_u64().unwrap(), string(&line["prompt"]), string(&line["text"])))
        .collect()
}

const SAMPLES: &str = "[samples]\nevery = 2\nprompts = ['The ', '']\ntokens = 9\ntemperature = 1.5\nseed = 3\n";

/// Writing on the way: what `generate` would write from the checkpoint of that step, and training goes on as without.
#[test]
fn a_run_writes_as_its_checkpoints_do_and_trains_as_if_it_had_not() {
    let place = Place::new();
    let config = String::from_utf8(place.read("run.toml")).unwrap();
    place.write("samples.toml", config + SAMPLES);
    place.ok("train -c run.toml --set run=without");
    place.ok("train -c samples.toml --set run=with");
    let (without, with) = (essence(&place.join("without"), 4), essence(&place.join("with"), 4));
    assert!(without.0 == with.0 && without.1 == with.1, "writing changed what was trained");
    let texts = written(&place, "with");
    assert_eq!(
        texts.iter().map(|t| (t.0, t.1.as_str())).collect::<Vec<_>>(),
        [(2, "The "), (2, ""), (4, "The "), (4, "")]
    );
    place.write("prompts.jsonl", "{\"prompt\": \"The \"}\n{\"prompt\": \"\"}\n");
    for step in [2, 4] {
        let line = format!("generate with/checkpoints/step-{step:08} --prompts prompts.jsonl --tokens 9");
        let said = place.ok(&format!("{line} --temperature 1.5 --seed 3")).out;
        let lines = said.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let expected: Vec<_> = lines.map(|line| line["text"].as_str().unwrap().to_string()).collect();
        let found: Vec<_> = texts.iter().filter(|t| t.0 == step).map(|t| t.2.clone()).collect();
        assert_eq!(found, expected, "step {step}");
    }
    // A run that goes on keeps the texts up to its checkpoint, and writes the others again.
    place.ok("train -c samples.toml --set run=on");
    std::fs::remove_dir_all(place.join("on/checkpoints/step-00000004")).unwrap();
    place.ok("resume on");
    assert!(essence(&place.join("on"), 4) == with, "resumed, it is another run");
    // One of two ranks writes.
    let line = "train -c samples.toml --set batch.micro_batches=2";
    place.ok(&format!("{line} --set run=alone"));
    start_ranks(2, |_| place.command(&format!("{line} --set run=both"))).into_iter().map(end).for_each(|said| {
        assert_eq!(said.code, 0, "{}", said.err);
    });
    assert_eq!(written(&place, "both"), written(&place, "alone"));
    assert!(place.ok("watch with").out.contains("step 4 writes: The"));
    place.ok("report with --out page.html");
    let page = String::from_utf8(place.read("page.html")).unwrap();
    assert!(page.contains(r#""step":2,"prompt":"The ""#), "{page}");
}

#[test]
fn samples_that_cannot_be_written_are_refused() {
    let place = Place::new();
    let run = |sets: &str| format!("train -c run.toml --set run=x --set samples.every=2 {sets}");
    place.refuses(&run("--set samples.temperature=-1"), &["samples.temperature = -1"]);
    place.refuses(&run("--set samples.top_p=0"), &["samples.top_p = 0"]);
    place.refuses(&run("--set samples.prompts=[]"), &["samples.prompts", "start of a document"]);
    place.refuses(&run("--set samples.prompt=x"), &["did you mean `prompts`"]);
    place.refuses(&run("--set data.path=data/train_000000.bin"), &["samples.every = 2", "no tokenizer"]);
    place.refuses("train -c rows.toml --set run=x --set samples.every=2", &["samples.every = 2", "classifier"]);
}

#[test]
fn stop_strings_end_a_text_before_them() {
    let place = Place::new();
    let text = |options: &str| place.ok(&format!("generate base --tokens 60 --json {options}")).json();
    let whole = text("")["text"].as_str().unwrap().to_string();
    // The first two letters or digits in a row, some way in.
    let characters: Vec<char> = whole.chars().collect();
    let pair = characters.windows(2).skip(5).find(|pair| pair.iter().all(char::is_ascii_alphanumeric));
    let stop = String::from_iter(pair.unwrap_or_else(|| panic!("the seed gives no two letters in a row: {whole:?}")));
    let cut = text(&format!("--stop {stop}"));
    let before = &whole[..whole.find(&stop).unwrap()];
    assert_eq!((&cut["text"], &cut["ended"]), (&json!(before), &json!("stop")));
    assert_eq!(text("")["ended"], "length");
    let streamed = place.ok(&format!("generate base --tokens 60 --stop {stop}")).out;
    assert_eq!(streamed, format!("{before}\n"), "what streams is what is kept");
}

#[test]
fn many_prompts_give_a_line_each() {
    let place = Place::new();
    place.write("prompts.jsonl", "{\"prompt\": \"a\"}\n{\"prompt\": \"b\", \"id\": 7}\n");
    let said = place.ok("generate base --prompts prompts.jsonl --tokens 10").out;
    let lines: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    assert_eq!((&lines[0]["prompt"], &lines[1]["prompt"]), (&json!("a"), &json!("b")));
    assert_eq!(lines[0], place.ok("generate base --prompt a --tokens 10 --json").json());
    place.write("bad.jsonl", "{\"prompt\": \"a\"}\n{\"text\": \"b\"}\n");
    place.refuses("generate base --prompts bad.jsonl", &["bad.jsonl", "line 2", "prompt"]);
    place.refuses("generate base --stop=", &["--stop"]);
}

#[test]
fn tasks_are_scored_as_the_losses_say() {
    let place = Place::new();
    place.ok("train -c run.toml --set run=long --set steps=60");

    let corpus = String::from_utf8(place.read("corpus.txt")).unwrap();
    let words: Vec<&str> = corpus.split_whitespace().take(200).collect();
    let tasks: String = (0..20)
        .map(|i| {
            let right = words[i * 5 + 2];
            let (label, endings) = if i % 2 == 0 { (0, [right, "#@~^"]) } else { (1, ["#@~^", right]) };
            let label = if i % 4 < 2 { json!(label) } else { json!(label.to_string()) };
            json!({"ctx": words[i * 5..i * 5 + 2].join(" "), "endings": endings, "label": label}).to_string() + "\n"
        })
        .collect();
    place.write("tasks.jsonl", &tasks);
    let score = place.ok("eval long --tasks tasks.jsonl --json").json();
    assert_eq!((&score["tasks"], &score["chance"]), (&json!(20), &json!(0.5)));
    // A model of this text cannot take bytes that it never holds for its words.
    assert!(score["accuracy_per_byte"].as_f64().unwrap() >= 0.9, "{score}");
    let one = place.ok("eval long --tasks tasks.jsonl --batch 1 --json").json();
    assert_eq!(score, one, "the number of endings at a time changes nothing");
    // With the labels turned round the same choices are wrong.
    let turned = tasks.replace("\"label\":0", "\"label\":9").replace("\"label\":1", "\"label\":0");
    let turned = turned.replace("\"label\":9", "\"label\":1").replace("\"label\":\"0\"", "\"label\":\"9\"");
    let turned = turned.replace("\"label\":\"1\"", "\"label\":\"0\"").replace("\"label\":\"9\"", "\"label\":\"1\"");
    place.write("turned.jsonl", turned);
    let wrong = place.ok("eval long --tasks turned.jsonl --json").json();
    let sum = score["accuracy"].as_f64().unwrap() + wrong["accuracy"].as_f64().unwrap();
    assert!((sum - 1.0).abs() < 1e-12, "{score} {wrong}");
}

#[test]
fn bad_tasks_are_named() {
    let place = Place::new();
    for (name, line, parts) in [
        ("label.jsonl", r#"{"ctx": "a", "endings": ["b", "c"], "label": 2}"#, &["line 1", "label"][..]),
        ("one.jsonl", r#"{"ctx": "a", "endings": ["b"], "label": 0}"#, &["line 1", "two or more"]),
        ("none.jsonl", r#"{"ctx": "a", "endings": ["b", "c"]}"#, &["line 1", "label"]),
        (
            "long.jsonl",
            &json!({"ctx": "a", "endings": ["b".repeat(40), "c"], "label": 0}).to_string(),
            &["41 tokens", "16"],
        ),
        ("empty.jsonl", "", &["empty"]),
    ] {
        place.write(name, line);
        place.refuses(&format!("eval base --tasks {name}"), parts);
    }
    place.refuses("eval classes --tasks label.jsonl", &["classifier"]);
    place.refuses("eval base", &["required", "<DATA>"]);
}

#[test]
fn bits_per_byte_follow_from_the_loss() {
    let place = Place::new();
    let result = place.ok("eval base corpus.txt --json").json();
    let (loss, bits) = (result["loss"].as_f64().unwrap(), result["bits_per_byte"].as_f64().unwrap());
    // A token is a byte here, and there is no token between documents.
    assert!((bits - loss / std::f64::consts::LN_2).abs() < 1e-12);
    let folder = place.ok("eval base data --json").json();
    assert!(
        (folder["bits_per_byte"].as_f64().unwrap() - folder["loss"].as_f64().unwrap() / std::f64::consts::LN_2).abs()
            < 1e-12
    );
    assert!(place.ok("eval base data/val_000000.bin --json").json()["bits_per_byte"].is_null());
    assert!(place.ok("eval base corpus.txt").out.contains("bits per byte"));
}
