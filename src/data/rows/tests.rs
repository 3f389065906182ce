use super::*;
use proptest::prelude::*;
use std::fs;

fn csv(content: &[u8], label_column: Option<&str>) -> Result<RowData> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.csv");
    fs::write(&path, content).unwrap();
    RowData::read_csv(&path, label_column)
}

fn csv_refusal(content: &str, label_column: Option<&str>) -> String {
    let error = csv(content.as_bytes(), label_column).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("rows.csv: "), "{error}");
    error.to_string()
}

#[test]
fn csv_with_and_without_header() {
    let plain = csv(b"1,2.5,0\n-3, 4e1 ,2\n", None).unwrap();
    assert_eq!(plain, RowData { features: vec![1.0, 2.5, -3.0, 40.0], labels: vec![0, 2], inputs: 2, classes: 3 });
    assert_eq!(csv(b"\xef\xbb\xbfa,b,class\n1,2.5,0\n\n-3,4e1,2.0", None).unwrap(), plain);
    assert_eq!(csv(b"class,a,b\r\n0,1,2.5\r\n2,-3,4e1\r\n", Some("class")).unwrap(), plain);
    assert_eq!(
        csv(b"0,1,2\n5,6,7\n", Some("0")).unwrap().labels,
        [5],
        "a name that the first line holds makes it a header"
    );
}

#[test]
fn bad_cells_are_named_with_line_and_column() {
    assert!(csv_refusal("a,b,c\n1,2,0\n1,x,0\n", None).contains("line 3, column 2 (b): `x` is not a finite float32"));
    assert!(csv_refusal("1,2,0\n1,,0\n", None).contains("line 2, column 2: `` is not a finite"));
    assert!(csv_refusal("1,nan,0\n", None).contains("line 1, column 2: `nan`"));
    assert!(csv_refusal("1,1e60,0\n", None).contains("`1e60` is not a finite"));
    assert!(csv_refusal("1,2,cat\n1,2,dog", None).contains("line 1, column 3: `cat` is not a class"));
    assert!(csv_refusal("1,2,0.5\n", None).contains("`0.5` is not a class"));
    assert!(csv_refusal("1,2,-1\n", None).contains("`-1` is not a class"));
    assert!(csv_refusal("1,2,65536\n", None).contains("`65536` is not a class"));
    assert!(csv_refusal("1,2,0\n1,0\n", None).contains("line 2: has 2 columns, but the first line has 3"));
    assert!(csv_refusal("1\n2\n", None).contains("single column"));
    assert!(csv_refusal("", None).contains("is empty"));
    assert!(csv_refusal("a,b\n", None).contains("no row of numbers"));
    assert!(csv_refusal("a,b\n1,2\n", Some("label")).contains("has no column label; its columns are a, b"));
    assert!(csv_refusal("1,2\n", Some("label")).contains("has no header"));
}

/// A `.npy` file as numpy.save writes it.
fn npy_bytes(descr: &str, shape: &str, order: &str, body: &[u8]) -> Vec<u8> {
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}");
    header.push_str(&" ".repeat(63 - (10 + header.len()) % 64));
    header.push('\n');
    [b"\x93NUMPY\x01\x00", &(header.len() as u16).to_le_bytes()[..], header.as_bytes(), body].concat()
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn npy(features: &[u8], labels: &[u8]) -> Result<RowData> {
    let dir = tempfile::tempdir().unwrap();
    let (x, y) = (dir.path().join("x.npy"), dir.path().join("y.npy"));
    fs::write(&x, features).unwrap();
    fs::write(&y, labels).unwrap();
    RowData::read_npy(&x, &y)
}

fn npy_refusal(features: &[u8], labels: &[u8]) -> String {
    let error = npy(features, labels).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains(".npy: "), "{error}");
    error.to_string()
}

#[test]
fn npy_of_every_type_that_is_read() {
    let expected = RowData { features: vec![1.0, 2.0, 3.0, 4.0], labels: vec![0, 1], inputs: 2, classes: 2 };
    let values = [1i64, 2, 3, 4];
    let bodies: [(&str, Vec<u8>); 5] = [
        ("<f4", values.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect()),
        ("<f8", values.iter().flat_map(|&v| (v as f64).to_le_bytes()).collect()),
        ("<i4", values.iter().flat_map(|&v| (v as i32).to_le_bytes()).collect()),
        ("<i8", values.iter().flat_map(|&v| v.to_le_bytes()).collect()),
        ("|u1", values.iter().map(|&v| v as u8).collect()),
    ];
    let labels = npy_bytes("|u1", "(2,)", "False", &[0, 1]);
    for (descr, body) in &bodies {
        assert_eq!(npy(&npy_bytes(descr, "(2, 2)", "False", body), &labels).unwrap(), expected, "{descr}");
    }
    let images =
        npy(&npy_bytes("<f4", "(1, 2, 2)", "False", &bodies[0].1), &npy_bytes("|u1", "(1, 1)", "False", &[1])).unwrap();
    assert_eq!((images.inputs, images.rows(), images.classes), (4, 1, 2));
}

#[test]
fn npy_files_that_lie_are_refused() {
    let x = npy_bytes("<f4", "(2, 2)", "False", &floats(&[1.0, 2.0, 3.0, 4.0]));
    let y = npy_bytes("|u1", "(2,)", "False", &[0, 1]);
    assert!(npy(&x, &y).is_ok());
    assert!(npy_refusal(&x[..x.len() - 1], &y).contains("15 bytes of numbers: it is cut off"));
    assert!(npy_refusal(&x[..30], &y).contains("cut off inside its header"));
    assert!(npy_refusal(b"text", &y).contains("is not a .npy file"));
    assert!(npy_refusal(&npy_bytes("<f2", "(1, 1)", "False", &[0, 0]), &y).contains("type <f2"));
    assert!(npy_refusal(&npy_bytes("<f4", "(2, 2)", "True", &floats(&[0.0; 4])), &y).contains("C order"));
    let huge = npy_bytes("<f4", "(4611686018427387904, 4)", "False", &[]);
    assert!(npy_refusal(&huge, &y).contains("cut off or damaged"));
    assert!(npy_refusal(&npy_bytes("<f4", "(0, 2)", "False", &[]), &y).contains("no rows"));
    assert!(npy_refusal(&npy_bytes("<f4", "(2,)", "False", &floats(&[0.0; 2])), &y).contains("two dimensions"));
    assert!(npy_refusal(&x, &npy_bytes("|u1", "(3,)", "False", &[0, 1, 0])).contains("there are 2 rows of inputs"));
    let infinite = npy_bytes("<f4", "(2, 2)", "False", &floats(&[1.0, 2.0, f32::INFINITY, 4.0]));
    assert!(npy_refusal(&infinite, &y).contains("row 1, column 0 (both from 0): inf"));
    assert!(
        npy_refusal(&x, &npy_bytes("<f4", "(2,)", "False", &floats(&[0.0, 0.5])))
            .contains("row 1, column 0 (both from 0): 0.5 is not a class")
    );
}

fn counting(rows: usize) -> RowData {
    RowData::new((0..rows * 2).map(|i| i as f32).collect(), (0..rows).map(|i| i as i32 % 3).collect(), 2)
}

#[test]
fn standardised_columns_have_mean_0_and_deviation_1() {
    let mut data = RowData::new(vec![1.0, 7.0, 3.0, 7.0, 8.0, 7.0], vec![0, 1, 0], 2);
    let by = data.standardization();
    assert_eq!((by.mean.clone(), by.std[1]), (vec![4.0, 7.0], 1.0), "a constant column is only shifted");
    data.standardize(&by).unwrap();
    let again = data.standardization();
    assert!(again.mean[0].abs() < 1e-6 && (again.std[0] - 1.0).abs() < 1e-6, "{again:?}");
    assert!(data.features.chunks(2).all(|row| row[1] == 0.0));
    assert!(RowData::new(vec![1.0], vec![0], 1).standardize(&by).is_err());
}

#[test]
fn the_split_keeps_every_row_once_with_its_label() {
    let (train, val) = counting(100).split(0.1).unwrap();
    let val = val.unwrap();
    assert_eq!((train.rows(), val.rows(), val.classes), (90, 10, 3));
    let mut rows: Vec<(i32, i32)> = [&train, &val]
        .iter()
        .flat_map(|part| part.features.chunks(2).zip(&part.labels).map(|(row, &label)| (row[0] as i32, label)))
        .collect();
    rows.sort();
    assert_eq!(rows, (0..100).map(|i| (2 * i, i % 3)).collect::<Vec<_>>());
    assert!(counting(100).split(0.0).unwrap().1.is_none());
    assert!(counting(100).split(0.7).is_err());
}

#[test]
fn batches_follow_the_order_and_end_with_uncounted_rows() {
    let data = counting(5);
    let mut batch = RowBatch::new(3, 2);
    assert_eq!(data.fill(&data.order(None).unwrap(), 3, &mut batch), 3);
    assert_eq!((&batch.inputs[..], &batch.labels[..]), (&[6.0, 7.0, 8.0, 9.0, 0.0, 1.0][..], &[0, 1, 0][..]));
    assert_eq!(data.fill_consecutive(3, &mut batch), 2);
    assert_eq!((&batch.inputs[4..], &batch.labels[..]), (&[0.0, 0.0][..], &[0, 1, -1][..]));
    let order = data.order(Some(1)).unwrap();
    let mut firsts: Vec<f32> = (0..5)
        .map(|i| {
            data.fill(&order, i, &mut batch);
            batch.inputs[0]
        })
        .collect();
    firsts.sort_by(f32::total_cmp);
    assert_eq!(firsts, [0.0, 2.0, 4.0, 6.0, 8.0]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    #[test]
    fn hostile_csv_gives_finite_rows_or_an_error(
        bytes in prop::collection::vec(prop_oneof![any::<u8>(), prop::sample::select(&b"0123,,\n\"-e."[..])], 0..200),
        label in prop_oneof![Just(None), Just(Some("1")), Just(Some("x"))],
    ) {
        if let Ok(data) = csv(&bytes, label) {
            prop_assert!(data.features.iter().all(|x| x.is_finite()));
            prop_assert_eq!(data.features.len(), data.rows() * data.inputs);
            prop_assert!(data.labels.iter().all(|&l| l >= 0 && (l as usize) < data.classes));
        }
    }

    #[test]
    fn damaged_npy_gives_rows_or_an_error(at in 0usize..160, byte in any::<u8>(), keep in 0usize..160) {
        let x = npy_bytes("<f4", "(2, 2)", "False", &floats(&[1.0, 2.0, 3.0, 4.0]));
        let y = npy_bytes("|u1", "(2,)", "False", &[0, 1]);
        let mut damaged = x.clone();
        if at < damaged.len() {
            damaged[at] = byte;
        }
        damaged.truncate(keep);
        if let Ok(data) = npy(&damaged, &y) {
            prop_assert_eq!(data.features.len(), data.rows() * data.inputs);
        }
        let _ = npy(&x, &damaged);
    }
}
