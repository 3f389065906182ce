// Index arithmetic at its extremes: each kernel of kernels/ runs its last blocks on arrays of more than 2^32 elements
// (far.hpp), which the AddressSanitizer has no room for.
#ifndef __SANITIZE_ADDRESS__
#include "far.hpp"

#include <cmath>

NEVER_FAR(tally, "one block goes over all rows with a 64-bit counter, which would take hours");
NEVER_FAR(decide, "over pieces of up to 65,536 elements, whose number has 32 bits");
NEVER_FAR(finish_update, "the same");
NEVER_FAR(muon_changes, "over blocks, whose number has 32 bits");
NEVER_FAR(mean_of_sums, "over tasks of 65,536 elements, whose number has 32 bits");
NEVER_FAR(embedding_sort, "over rows, of which the launcher allows 2^31");

TEST(every_kernel_has_been_at_its_far_end) {
    for (const emulator::Kernel& kernel : emulator::kernels()) {
        if (kernel.shared_begin == SHARED_BEGIN) continue;  // Of the emulator's own tests.
        std::string name = kernel.name;
        for (const char* type : {"_f32", "_bf16"})
            if (name.ends_with(type)) name.resize(name.size() - std::string(type).size());
        if (covered().count(name)) continue;
        std::printf("%s has no case in tests/emulator/check/far.cpp\n", name.c_str());
        failures++;
    }
}

// The first blocks must not be able to hide behind the end: an index that wraps around is seen.
TEST(a_wrapped_index_is_seen) {
    Far array(MANY, 4);
    array.at<u32>(MANY - 1) = 1;
    EXPECT(array.at<u32>(MANY - 1) == 1 && u32(MANY - 1) < MANY - TAIL / 4);
    Run run("norm_scale", 4, true);
    run.output(MANY);
    int before = failures;
    // Of fewer elements than the array has, so that its end is not reached.
    run.last(1, 1, 256, 0, {*run.outputs[0], u64(4), 0.5f});
    EXPECT(failures > before);
    failures = before;
}

static u32 blocks(u64 n, u64 each) { return u32((n + each - 1) / each); }

FAR(activate) {
    Far &y = run.output(MANY), &x = run.input(MANY);
    run.last(1, blocks(MANY, 512 * run.wide), 256, 0, {y, x, MANY, 0u});
}
FAR(activate_backward) {
    Far &d = run.output(MANY), &x = run.input(MANY);
    run.last(1, blocks(MANY, 512 * run.wide), 256, 0, {d, x, MANY, 0u});
}
FAR(gate) {
    u32 ffn = 256;
    Far &y = run.output(u64(ROWS) * ffn), &x = run.input(u64(ROWS) * 2 * ffn);
    run.last(1, ROWS, ffn / run.wide, 0, {y, x, ffn});
}
FAR(gate_backward) {
    u32 ffn = 256;
    Far &d = run.output(u64(ROWS) * 2 * ffn), &dy = run.input(u64(ROWS) * ffn), &x = run.input(u64(ROWS) * 2 * ffn);
    run.last(1, ROWS, ffn / run.wide, 0, {d, dy, x, ffn});
}

FAR(norm_forward) {
    u32 width = 256;
    u64 rows = u64(ROWS) * 8, n = rows * width;
    Far &y = run.output(n), &statistics = run.output(2 * rows, 4), &x = run.input(n), &sum = run.output(n);
    Far &branch = run.input(n), &gain = run.input(width), &bias = run.input(width);
    run.last(1, ROWS, 256, 0, {y, statistics, x, sum, branch, gain, bias, rows, width, 0u, 1.0f, 1.0f});
}
FAR(norm_forward_long) {
    u32 width = 1024;
    u64 n = u64(ROWS) * width;
    Far &y = run.output(n), &statistics = run.output(2ull * ROWS, 4), &x = run.input(n), &sum = run.output(n);
    Far &branch = run.input(n), &gain = run.input(width), &bias = run.input(width);
    run.last(1, ROWS, 64, 0, {y, statistics, x, sum, branch, gain, bias, width, 0u, 1.0f, 1.0f});
}
FAR(norm_backward_sums) {
    u32 width = 1024;
    u64 n = u64(ROWS) * width;
    Far &sums = run.output(2ull * ROWS, 4), &dy = run.input(n), &x = run.input(n);
    Far &statistics = run.input(2ull * ROWS, 4), &gain = run.input(width);
    run.last(1, ROWS, 256, 0, {sums, dy, x, statistics, gain, width});
}
FAR(norm_backward) {
    u32 width = 256, warps = width / run.wide / 32;
    u64 rows = u64(ROWS) * 3, n = rows * width;
    Far &dx = run.output(n), &partials = run.output(u64(ROWS) * 2 * width, 4), &dy = run.input(n), &x = run.input(n);
    Far &statistics = run.input(2 * rows, 4), &sums = run.input(2 * rows, 4), &gain = run.input(width);
    for (Argument given : {Argument(sums), Argument(nullptr)})
        run.last(1, ROWS, 2 * warps * 32, 0,
                 {dx, partials, dy, x, statistics, given, gain, rows, 3u, warps, width, 2u, 0u, 1u});
}
FAR(add_up) {
    u32 width = 1u << 31;
    Far &first = run.output(width), &partials = run.input(6ull * width, 4);
    for (u64 row = 1; row < 6; row++) partials.open(row * width - WARP, WARP);
    partials.at<f32>(6ull * width - 1) = 1;
    run.last(1, dim3(width / WARP), 1024, 0, {first, nullptr, run.type(), partials, u64(6), width});
    Far& second = run.output(width);
    run.last(1, dim3(width / WARP, 2), 1024, 0, {first, second, run.type(), partials, u64(3), width});
    EXPECT(run.is_one(first, width - 1) && run.is_one(second, width - 1));
}
FAR(norm_add) {
    Far &y = run.output(MANY), &x = run.input(MANY), &branch = run.input(MANY);
    run.last(1, blocks(MANY, 256 * run.wide), 256, 0, {y, x, branch, MANY, 1.0f});
}
FAR(norm_scale) {
    Far& x = run.output(MANY);
    run.last(1, blocks(MANY, 256 * run.wide), 256, 0, {x, MANY, 0.5f});
}

FAR(embedding_forward) {
    u32 width = 256, last = ROWS - 1;
    u64 n = u64(ROWS) * width;
    Far &x = run.output(n), &tokens = run.input(ROWS, 4), &weight = run.input(n);
    Far& positions = run.input((3ull + ROWS) * width);
    tokens.at<u32>(last) = last;
    run.last(1, ROWS, 64, 0, {x, tokens, weight, positions, width, ROWS, 3u, 1.0f});
}
FAR(embedding_windows) {
    // The last window begins with a token of the one before, and goes on with the vocabulary's last.
    u32 width = 1024, window = 256, vocabulary = 1u << 23;
    u32 windows = blocks(ROWS, window), from = (windows - 1) * window;
    Far &dweight = run.output(u64(vocabulary) * width), &partials = run.input(2ull * windows * width, 4);
    Far &dx = run.input(u64(ROWS) * width), &tokens = run.input(ROWS, 4), &order = run.input(ROWS, 4);
    run.set_one(dx, u64(ROWS) * width - 1);
    for (u32 p = from - 1; p < ROWS; p++) {
        order.at<u32>(p) = p;
        tokens.at<u32>(p) = p <= from ? vocabulary - 2 : vocabulary - 1;
    }
    // What began before the window goes to the first of its two places.
    u32& partial = partials.at<u32>((2ull * windows - 1) * width - 1);
    partial = 1;
    run.last(1, dim3(windows, blocks(width, 256 * run.wide)), 256, 0,
             {dweight, run.type(), partials, dx, tokens, order, ROWS, window, width, 1.0f});
    EXPECT(partial == 0);
}
FAR(embedding_join) {
    // One token in the last two windows.
    u32 width = 1024, warps = width / run.wide / 32, window = 256, vocabulary = 1u << 23;
    u32 windows = blocks(ROWS, window), next = (windows - 1) * window;
    Far &dweight = run.output(u64(vocabulary) * width), &partials = run.input(2ull * windows * width, 4);
    Far &tokens = run.input(ROWS, 4), &order = run.input(ROWS, 4), &starts = run.input(vocabulary + 1, 4);
    for (u32 p = next - 1; p <= next; p++) order.at<u32>(p) = p, tokens.at<u32>(p) = vocabulary - 1;
    partials.at<f32>((2ull * windows - 1) * width - 1) = 1;
    starts.at<u32>(vocabulary - 1) = next - window, starts.at<u32>(vocabulary) = ROWS;
    run.last(2, windows, 256, 0,
             {dweight, run.type(), partials, tokens, order, starts, ROWS, window, width, warps, 1.0f});
}
FAR(embedding_positions) {
    // Two sequences.
    u32 width = 128 * run.wide, warps = 4;
    u64 rows = 2ull * ROWS;
    Far &dpositions = run.output(u64(ROWS) * width), &dx = run.input(rows * width);
    dx.open(u64(ROWS - 1) * width, width);
    run.last(1, ROWS, 256, 0, {dpositions, run.type(), dx, rows, ROWS, width, warps});
}

FAR(cross_entropy) {
    u32 padded = 256;
    Far &losses = run.output(ROWS, 4), &logits = run.output(u64(ROWS) * padded), &targets = run.input(ROWS, 4);
    run.last(1, ROWS, 64, 0, {losses, logits, targets, 250u, padded, 0u, 1u, 1.0f});
}
FAR(counted_rows) {
    u32 width = 256;
    Far &to = run.output(u64(ROWS) * width), &from = run.input(u64(ROWS) * width), &targets = run.input(ROWS, 4);
    run.last(1, ROWS, 64, 0, {to, from, targets, width});
}

FAR(head_norm_forward) {
    u32 size = 64, queries = 2, keys = 1, row = (queries + 2 * keys) * size;
    Far &out = run.output(u64(ROWS) * row), &statistics = run.output(u64(ROWS) * (queries + keys), 4);
    Far &qkv = run.input(u64(ROWS) * row), &gain = run.input(size);
    Far& table = run.input((5ull + ROWS) * size, 4);
    for (Argument angles : {Argument(nullptr), Argument(table)})
        run.last(1, ROWS, 32, 0,
                 {out, statistics, qkv, gain, gain, angles, ROWS, 5u, queries, keys, size, 8u, 1.0f});
}
FAR(head_norm_backward) {
    u32 size = 64, queries = 2, keys = 1, row = (queries + 2 * keys) * size;
    u64 rows = 3ull * ROWS;
    // The last head is one of the values, which have no norm.
    Far &d = run.input(rows * row), &partials = run.output(u64(ROWS) * 2 * size, 4), &qkv = run.input(rows * row);
    Far &statistics = run.input(rows * (queries + keys), 4), &gain = run.input(size);
    u32 threads = 32, lanes = 8, shared = threads / lanes * 2 * size * 4;
    Far& table = run.input((5ull + ROWS) * size, 4);
    for (Argument angles : {Argument(nullptr), Argument(table)})
        run.last(1, ROWS, threads, shared,
                 {d, partials, qkv, statistics, gain, gain, angles, ROWS, 5u, rows, 3u, queries, keys, size, lanes});
}
FAR(rotary) {
    u32 half = 32, heads = 3, width = heads * 2 * half;
    Far &qkv = run.output(u64(ROWS) * width), &table = run.input((5ull + ROWS) * 2 * half, 4);
    run.last(1, ROWS, 64, 0, {qkv, table, heads, half, width, ROWS, 5u, 0u});
}

FAR(partial_column_sums) {
    u32 columns = 1u << 31;
    Far &partials = run.output(3ull * columns, 4), &x = run.input(5ull * columns);
    run.last(1, dim3(columns / (32 * run.wide), 3), 256, 0, {partials, x, 5ull, columns, 2u, 1u});
    run.last(1, dim3(columns / 32, 3), 256, 0, {partials, x, 5ull, columns, 2u, 0u});
}
FAR(partial_column_sums_of_many_rows) {
    // The last block has one row.
    u32 columns = 32, per_block = 1u << 17, parts = 0xffff;
    u64 rows = (parts - 1ull) * per_block + 1;
    run.kernel.erase(run.kernel.find("_of_many_rows"), 13);
    Far &partials = run.output(u64(parts) * columns, 4), &x = run.input(rows * columns);
    run.last(1, dim3(1, parts), 256, 0, {partials, x, rows, columns, per_block, 0u});
}
FAR(add_partials) {
    u32 columns = 1u << 31, rows = 3;
    Far &out = run.output(columns), &partials = run.input(u64(rows) * columns, 4);
    for (u64 row = 1; row < rows; row++) partials.open(row * columns - 32, 32);
    run.last(1, columns / 32, 256, 0, {out, run.type(), partials, rows, columns, 0u});
}

// Two heads of 16, sequences of 16 tokens, as many as a grid has blocks for.
struct Heads {
    u32 batch = 1u << 29, tokens = 16, heads = 2, size = 16, padded = 128;
    u64 tokens_in_all = u64(batch) * tokens, width = u64(heads) * size, row = 3 * width;
};
FAR(attention_forward) {
    Heads h;
    Far &out = run.output(h.tokens_in_all * h.width), &log_sum_exp = run.output(h.tokens_in_all * h.heads, 4);
    Far &qkv = run.input(h.tokens_in_all * h.row), &first_key = run.input(h.tokens_in_all, 4);
    u32 columns = run.size == 2 ? 64 : 32;
    const u8 *k = qkv.data() + h.width * run.size, *v = k + h.width * run.size;
    run.last(1, h.batch * h.heads, 128, (128 + 4 * columns) * h.size * run.size,
             {out, log_sum_exp, qkv, k, v, first_key, h.row, u64(h.tokens), h.row, u64(h.tokens), h.row, u64(h.tokens),
              h.heads, 1u, h.size, h.tokens, h.tokens, 1.0f});
}
FAR(attention_decode) {
    Heads h;
    u32 queries = 3, splits = 1;
    u64 items = u64(h.batch) * queries * h.heads * splits;
    Far &partials = run.output(items * (h.size + 2), 4), &qkv = run.input(h.tokens_in_all * h.row);
    Far& first_key = run.input(u64(h.batch) * queries, 4);
    const u8 *k = qkv.data() + h.width * run.size, *v = k + h.width * run.size;
    const u8* q = qkv.data() + (h.tokens - queries) * h.row * run.size;
    // One query head for each key/value head, whose three queries are a block's.
    run.last(1, h.batch * h.heads, 128, 0,
             {partials, q, k, v, first_key, h.row, u64(h.tokens), h.row, u64(h.tokens), h.row, u64(h.tokens), h.heads,
              1u, h.size, queries, h.tokens, u32(h.size / run.wide), 1.0f});
}
FAR(attention_decode_join) {
    u32 size = 16, splits = 2;
    Far &out = run.output(u64(ROWS) * size), &log_sum_exp = run.output(ROWS, 4);
    Far& partials = run.input(u64(ROWS) * splits * (size + 2), 4);
    run.last(1, ROWS, 128, 0, {out, log_sum_exp, partials, splits, size});
}
FAR(attention_backward_inner) {
    Heads h;
    u64 saved_items = u64(h.batch) * h.heads * h.padded;
    Far &saved = run.output(saved_items, 16), &out = run.input(h.tokens_in_all * h.width);
    Far &dout = run.input(h.tokens_in_all * h.width), &log_sum_exp = run.input(h.tokens_in_all * h.heads, 4);
    Far& first_key = run.input(h.tokens_in_all, 4);
    run.last(2, blocks(saved_items * 2, 256), 256, 0,
             {saved, out, dout, log_sum_exp, first_key, h.batch, h.heads, h.size, h.tokens, h.padded});
}
static void attention_backward(Run& run, bool by_query) {
    Heads h;
    // The last elements of a token are its values'; the queries' are before.
    Far &dqkv = by_query ? run.input(h.tokens_in_all * h.row) : run.output(h.tokens_in_all * h.row);
    Far &dout = run.input(h.tokens_in_all * h.width), &qkv = run.input(h.tokens_in_all * h.row);
    Far &saved = run.input(u64(h.batch) * h.heads * h.padded, 16), &first_key = run.input(h.tokens_in_all, 4);
    u64 rows = by_query || run.size == 2 ? 128 : 64, columns = 32;
    u64 last_query = h.tokens_in_all * h.row - 2 * h.width - 1;
    u64 shared = (2 * rows + 4 * columns) * h.size * run.size + (by_query ? rows : 2 * columns) * 16;
    u8* written = dqkv.data() + last_query * run.size;
    *written = UNWRITTEN;
    run.last(1, h.batch * h.heads, 128, shared,
             {dqkv, dout, qkv, saved, first_key, h.row, h.width, h.width, h.heads, 1u, h.size, h.tokens, h.padded,
              1.0f});
    EXPECT(!by_query || *written != UNWRITTEN);
}
FAR(attention_backward_queries) { attention_backward(run, true); }
FAR(attention_backward_keys) { attention_backward(run, false); }

FAR_PLAIN(expand) {
    u32 columns = 1u << 13;
    u64 rows = MANY / columns + 1, n = rows * columns;
    Far &target = run.output(n, 4), &values = run.input(n, 4), &given = run.input(n, 4);
    Far& map = run.input(rows, 4);
    std::vector<u32> columns_map(columns);
    for (u32 c = 0; c < columns; c++) columns_map[c] = c;
    map.at<u32>(rows - 1) = u32(rows - 1), map.at<u32>(rows - 2) = u32(rows - 2);
    Far& rows_scale = run.input(rows, 8);
    std::vector<double> columns_scale(columns, 1.0);
    for (bool scaled : {false, true})
        run.last(1, blocks(n, 4096), 256, 0,
                 {target, 1u, u64(0), n, values, 1u, columns, map, columns_map, columns, 1.0,
                  scaled ? Argument(rows_scale) : Argument(nullptr), scaled ? Argument(columns_scale) : Argument(nullptr),
                  1u, 1.0, u64(1), u64(2), given, u64(0)});
}
FAR_PLAIN(fill) {
    Far& target = run.output(MANY, 4);
    run.last(1, blocks(MANY, 4096), 256, 0, {target, 1u, u64(0), MANY, 1.0, 1u, 1.0, u64(1), u64(2)});
}
FAR_PLAIN(copies_of_columns) {
    u32 columns = 0xfffffffe;
    std::vector<u32> first_copy(1);
    Far &next_copy = run.output(columns, 4), &map = run.input(columns, 4);
    run.last(1, blocks(columns, 256), 256, 0, {first_copy, next_copy, map, columns, 0u});
}
FAR_PLAIN(paired_noise) {
    u32 columns = 64;
    Far& noise = run.output(u64(ROWS) * columns, 4);
    std::vector<u32> first_copy{0}, next_copy(columns);
    for (u32 c = 0; c < columns; c++) next_copy[c] = c + 1 < columns ? c + 1 : 0xffffffff;
    u64 first_row = u64(ROWS) * 4, start = (first_row + ROWS - 1) * columns;
    run.last(1, ROWS, 256, 0, {noise, 0u, first_row, columns, first_copy, next_copy, 1u, f64(columns), u64(1), u64(2)});
    // But for their mean, the numbers that `fill` draws for these elements.
    std::vector<f32> drawn(columns);
    run.kernel = "fill";
    run.last(1, 1, 256, 0, {drawn, 1u, start, u64(columns), 0.0, 1u, 1.0, u64(1), u64(2)});
    const f32* row = &noise.at<f32>(u64(ROWS - 1) * columns);
    for (u32 c = 1; c < columns; c++) EXPECT(std::abs((row[c] - row[0]) - (drawn[c] - drawn[0])) < 1e-5f);
}
FAR_PLAIN(square_sums) {
    Far &x = run.input(MANY, 4), &sums = run.output(blocks(MANY, 65536), 8);
    run.last(1, blocks(MANY, 65536), 256, 0, {sums, x, 1u, MANY});
}

FAR_PLAIN(accumulate) {
    Far &target = run.output(MANY, 4), &source = run.input(MANY, 2);
    run.last(1, blocks(MANY, 2048), 512, 0, {target, 1u, source, 2u, MANY, 0u});
}
FAR_PLAIN(square_norms) {
    Far &gradients = run.input(MANY), &partials = run.output(1, 8);
    std::vector<Piece> pieces{{MANY - 1000, 1000, 0}};
    std::vector<RowSettings> rows(1);
    run.last(1, 1, 512, 0, {partials, gradients, run.type(), pieces, rows});
}

// A last piece, and what the kernels of the update read beside it.
struct Update {
    std::vector<Piece> pieces{{MANY - 1001, 1001, 0}};
    std::vector<RowSettings> rows{{1, 0.5, 1, 1, 0}};
    std::vector<f64> chunks = std::vector<f64>(8), scalars = std::vector<f64>(16);
    Update() { scalars[LEARNING_RATE] = scalars[TIME] = scalars[FACTOR] = 1; }
};
FAR(sgd) {
    Update u;
    Far &weights = run.output(MANY), &master = run.output(MANY, 4), &first = run.output(MANY);
    Far& gradients = run.input(MANY);
    run.last(8, 8, 256, 0,
             {weights, master, first, run.type(), gradients, run.type(), u.chunks, u.scalars, u.pieces, u.rows, u64(5), u64(7),
              0.9, 0.0, 0u});
}
FAR(adam) {
    Update u;
    Far &weights = run.output(MANY), &master = run.output(MANY, 4), &first = run.output(MANY);
    Far &second = run.output(MANY), &maximum = run.output(MANY), &gradients = run.input(MANY);
    run.last(8, 8, 256, 0,
             {weights, master, first, second, maximum, run.type(), gradients, run.type(), u.chunks, u.scalars, u.pieces,
              u.rows, u64(5), u64(7), 0.9, 0.95, 0u});
}
FAR(lion) {
    Update u;
    Far &weights = run.output(MANY), &master = run.output(MANY, 4), &first = run.output(MANY);
    Far& gradients = run.input(MANY);
    run.last(8, 8, 256, 0,
             {weights, master, first, run.type(), gradients, run.type(), u.chunks, u.scalars, u.pieces, u.rows, u64(5), u64(7),
              0.9, 0.95});
}
FAR(sum_chunks) {
    u32 count = 1u << 30;
    Far &partials = run.output(count, 8), &chunks = run.input(8ull * count, 8);
    run.last(1, count / 256, 256, 0, {partials, chunks, count});
}

FAR(muon_momentum) {
    Update u;
    u64 chunk = 8192;
    Far &x = run.output(MANY), &first = run.output(MANY), &gradient = run.input(MANY);
    Far& sums = run.output(blocks(MANY, chunk), 8);
    run.last(1, blocks(MANY, chunk), 256, 0,
             {x, first, run.type(), gradient, run.type(), sums, u.scalars, u64(5), MANY, MANY, chunk});
}
FAR(muon_normalise) {
    u64 chunk = 8192;
    Far& x = run.output(MANY);
    std::vector<f64> sums{1};
    run.last(1, blocks(MANY, chunk), 256, 0, {x, sums, 1u, 1.0, MANY, chunk});
}
FAR(muon_apply) {
    Update u;
    u64 chunk = 8192;
    Far &weight = run.output(MANY), &master = run.output(MANY, 4), &x = run.input(MANY);
    Far& sums = run.output(blocks(MANY, chunk), 8);
    run.last(1, blocks(MANY, chunk), 256, 0, {weight, master, x, sums, u.scalars, 1.0, 0.5, MANY, chunk});
}
#endif
