//! Filling a micro-batch of tokens on the host.

use super::{Order, TokenData, Tokens};

/// The target of a position that is not counted in the loss.
pub const IGNORED: i32 = -1;

/// One micro-batch on the host: rows of `context` tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenBatch {
    /// The tokens, batch × context.
    pub inputs: Vec<i32>,
    /// The token after each input, batch × context; -1 where the loss does not count it.
    pub targets: Vec<i32>,
    /// The first position in its row that each position may attend to, batch × context: 0, or with attention reset at
    /// document borders the start of the position's document.
    pub first_key: Vec<i32>,
    context: usize,
}

impl TokenBatch {
    /// An empty batch of `batch` rows, to be filled again and again.
    pub fn new(batch: usize, context: usize) -> Self {
        let zeros = vec![0; batch * context];
        Self { inputs: zeros.clone(), targets: zeros.clone(), first_key: zeros, context }
    }

    /// Tokens in a row.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.inputs.len() / self.context
    }
}

/// What filling a batch heeds besides the tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BatchRules {
    /// The token that ends a document, if attention shall not reach back over it. The position of the token itself
    /// still belongs to the document that it ends.
    pub reset_attention_after: Option<u32>,
    /// A token, such as padding, that is not to be predicted.
    pub ignored_target: Option<u32>,
}

impl TokenData {
    /// Fills row r with the window at the global index `first_sample` + r of `order`, which must be over the windows of
    /// this data and context. Returns the number of targets that count. Allocates nothing.
    pub fn fill(&self, order: &Order, first_sample: u64, rules: &BatchRules, batch: &mut TokenBatch) -> usize {
        assert_eq!(order.samples(), self.windows(batch.context), "the order belongs to other data or another context");
        (0..batch.rows()).map(|row| self.fill_row(order.sample(first_sample + row as u64), row, rules, batch)).sum()
    }

    /// Fills the batch with consecutive windows from `first_window`, for evaluation. Rows past the last window have no
    /// target that counts. Returns the number of targets that do; 0 tells that there is no window left.
    pub fn fill_consecutive(&self, first_window: u64, rules: &BatchRules, batch: &mut TokenBatch) -> usize {
        (0..batch.rows()).map(|row| self.fill_row(first_window + row as u64, row, rules, batch)).sum()
    }

    fn fill_row(&self, mut window: u64, row: usize, rules: &BatchRules, batch: &mut TokenBatch) -> usize {
        let context = batch.context;
        let range = row * context..(row + 1) * context;
        let inputs = &mut batch.inputs[range.clone()];
        let targets = &mut batch.targets[range.clone()];
        let first_key = &mut batch.first_key[range];
        for span in &self.spans {
            let windows = span.windows(context);
            if window < windows {
                let start = span.start + window as usize * context;
                match span.all() {
                    Tokens::Uint16(tokens) => copy(&tokens[start..=start + context], inputs, targets),
                    Tokens::Uint32(tokens) => copy(&tokens[start..=start + context], inputs, targets),
                }
                mark_documents(inputs, first_key, rules.reset_attention_after);
                return ignore_targets(targets, rules.ignored_target);
            }
            window -= windows;
        }
        inputs.fill(0);
        targets.fill(IGNORED);
        first_key.fill(0);
        0
    }
}

/// Copies a window of context + 1 tokens into inputs and targets.
fn copy<T: Copy + Into<u32>>(window: &[T], inputs: &mut [i32], targets: &mut [i32]) {
    // Vocabularies lie far below 2³¹: embeddings of more rows than that do not fit any machine.
    let id = |token: T| token.into() as i32;
    for ((input, target), pair) in inputs.iter_mut().zip(targets).zip(window.windows(2)) {
        (*input, *target) = (id(pair[0]), id(pair[1]));
    }
}

fn mark_documents(inputs: &[i32], first_key: &mut [i32], end_of_text: Option<u32>) {
    let mut start = 0;
    for (at, (&input, first)) in inputs.iter().zip(first_key).enumerate() {
        *first = start;
        if Some(input as u32) == end_of_text {
            start = at as i32 + 1;
        }
    }
}

/// Marks the targets that are not to be predicted, and counts the others.
fn ignore_targets(targets: &mut [i32], ignored: Option<u32>) -> usize {
    let Some(ignored) = ignored else { return targets.len() };
    let mut counted = targets.len();
    for target in targets.iter_mut().filter(|target| **target as u32 == ignored) {
        *target = IGNORED;
        counted -= 1;
    }
    counted
}
