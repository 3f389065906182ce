//! The Kubernetes manifests in tools/cluster against a description of the fields that they use (`kubernetes.json`), and
//! against the launcher, which must take their arguments and variables.

use crate::job::{Place, begin, free_port};
use serde_json::Value;
use std::path::Path;
use yaml_rust2::{Yaml, YamlLoader};

fn read(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn documents(name: &str) -> Vec<Yaml> {
    YamlLoader::load_from_str(&read(&format!("tools/cluster/{name}"))).unwrap()
}

/// What is wrong with a value, with the path to it.
fn faults(at: &str, value: &Yaml, rule: &Value) -> Vec<String> {
    let fault = |why: &str| vec![format!("{at}: {value:?} {why}")];
    match (rule, value) {
        (Value::Object(fields), Yaml::Hash(found)) => {
            let any = fields.get("*");
            let needed = fields.keys().filter_map(|key| key.strip_suffix('!'));
            let missing = needed.filter(|key| found.get(&Yaml::String(key.to_string())).is_none());
            let mut faults: Vec<_> = missing.map(|key| format!("{at}.{key} is missing")).collect();
            for (key, value) in found {
                let key = key.as_str().unwrap_or_default();
                match fields.get(key).or(fields.get(&format!("{key}!"))).or(any) {
                    Some(rule) => faults.extend(self::faults(&format!("{at}.{key}"), value, rule)),
                    None => faults.push(format!("{at}.{key} is no field")),
                }
            }
            faults
        }
        (Value::Array(rule), Yaml::Array(values)) => {
            values.iter().enumerate().flat_map(|(i, value)| faults(&format!("{at}[{i}]"), value, &rule[0])).collect()
        }
        (Value::String(rule), value) => {
            let text = value.as_str();
            let label = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            let right = match rule.as_str() {
                "string" => text.is_some(),
                "integer" => value.as_i64().is_some(),
                "boolean" => value.as_bool().is_some(),
                "quantity" => {
                    value.as_i64().is_some() || text.is_some_and(|t| t.starts_with(|c: char| c.is_ascii_digit()))
                }
                "name" => text.is_some_and(|name| (1..64).contains(&name.len()) && name.chars().all(label)),
                choices => text.is_some_and(|text| choices[1..].split('|').any(|choice| choice == text)),
            };
            if right { vec![] } else { fault(&format!("is not {rule}")) }
        }
        _ => fault("is of another kind"),
    }
}

#[test]
fn manifests_have_known_fields_only() {
    let rules: Value = serde_json::from_str(&read("tests/launcher/kubernetes.json")).unwrap();
    let check = |document: &Yaml| {
        let kind = document["kind"].as_str().unwrap().to_string();
        faults(&kind, document, &rules[&kind])
    };
    let all: Vec<Yaml> = ["kubernetes-job.yaml", "kubeflow-trainjob.yaml"].into_iter().flat_map(documents).collect();
    assert_eq!(all.iter().map(|d| d["kind"].as_str().unwrap()).collect::<Vec<_>>(), ["Service", "Job", "TrainJob"]);
    for document in &all {
        assert_eq!(check(document), Vec::<String>::new());
    }
    // The check itself finds what is wrong.
    let text = read("tools/cluster/kubernetes-job.yaml");
    for (right, wrong, fault) in [
        ("completionMode: Indexed", "completionMode: indexed", "Job.spec.completionMode"),
        ("parallelism: 2", "paralellism: 2", "Job.spec.paralellism is no field"),
        ("action: FailJob", "acts: FailJob", "Job.spec.podFailurePolicy.rules[2].action is missing"),
        ("value: \"2\"", "value: 2", "Job.spec.template.spec.containers[0].env[0].value"),
        ("completions: 2", "completions: [2]", "Job.spec.completions"),
    ] {
        assert!(text.contains(right), "{right}");
        let found = check(&YamlLoader::load_from_str(&text.replace(right, wrong)).unwrap()[1]);
        assert!(found.iter().any(|f| f.starts_with(fault)), "{wrong}: {found:?}");
    }
}

#[test]
fn what_belongs_together_agrees() {
    let all = documents("kubernetes-job.yaml");
    let (service, job) = (&all[0], &all[1]);
    let (name, spec) = (job["metadata"]["name"].as_str().unwrap(), &job["spec"]);
    let pod = &spec["template"]["spec"];
    let container = &pod["containers"][0];
    let variable = |name: &str| {
        let all = container["env"].as_vec().unwrap();
        all.iter().find(|v| v["name"].as_str() == Some(name)).and_then(|v| v["value"].as_str()).unwrap().to_string()
    };
    assert_eq!(pod["subdomain"], service["metadata"]["name"]);
    assert_eq!(service["spec"]["selector"]["job-name"].as_str(), Some(name));
    assert_eq!(spec["completions"], spec["parallelism"]);
    assert_eq!(variable("PET_NNODES").parse().ok(), spec["completions"].as_i64());
    // An indexed pod's host name is that of the job and the index.
    assert_eq!(variable("PET_MASTER_ADDR"), format!("{name}-0.{}", pod["subdomain"].as_str().unwrap()));
    assert_eq!(variable("PET_MASTER_PORT").parse().ok(), container["ports"][0]["containerPort"].as_i64());
    for rule in spec["podFailurePolicy"]["rules"].as_vec().unwrap() {
        let container_of = &rule["onExitCodes"]["containerName"];
        assert!(container_of.is_badvalue() || *container_of == container["name"]);
    }
    let mounts = container["volumeMounts"].as_vec().unwrap().iter().map(|mount| &mount["name"]);
    let volumes = pod["volumes"].as_vec().unwrap().iter().map(|volume| &volume["name"]);
    assert_eq!(mounts.collect::<Vec<_>>(), volumes.collect::<Vec<_>>());
}

/// Two pods: the arguments as they stand, the variables as a cluster sets them.
#[test]
fn the_launcher_takes_their_arguments() {
    for (file, document) in [("kubernetes-job.yaml", 1), ("kubeflow-trainjob.yaml", 0)] {
        let spec = &documents(file)[document]["spec"];
        let container = if document == 1 { &spec["template"]["spec"]["containers"][0] } else { &spec["trainer"] };
        assert_eq!(container["command"][0].as_str(), Some("mupscale-launch"));
        let all = container["args"].as_vec().unwrap().iter().map(|argument| argument.as_str().unwrap());
        // There is no GPU here; `echo` stands for mupscale.
        let all: Vec<_> = all.map(|a| if a == "mupscale" { "echo" } else { a }).collect();
        let line = all.join(" ").replace("=gpu", "=1");
        let (place, port) = (Place::new(), free_port().to_string());
        let pods = ["0", "1"].map(|rank| {
            let mut command = place.command(&line, "");
            for (name, value) in [
                ("NNODES", "2"),
                ("NPROC_PER_NODE", "1"),
                ("NODE_RANK", rank),
                ("MASTER_ADDR", "127.0.0.1"),
                ("MASTER_PORT", &port),
                ("LOCAL_ADDR", "127.0.0.1"),
            ] {
                command.env(format!("PET_{name}"), value);
            }
            begin(command)
        });
        for (rank, pod) in pods.into_iter().enumerate() {
            let said = pod.end();
            assert_eq!(said.code, 0, "{file}: {}", said.err);
            assert_eq!(said.out, format!("[rank {rank}] train --config=/data/run.toml --resume=auto\n"));
        }
    }
}
