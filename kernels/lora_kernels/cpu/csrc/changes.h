// Changes that adapters make to vectors: addition, multiplication, rotation, products with blocks. Included inside the
// instruction set's namespace.
#pragma once

// Rows that share a block, in registers, while the L1 cache holds it.
constexpr int64_t kBlockRows = 4;

template <typename T>
inline void turn_groups(const ChangeOp& op, T* x) {
  const int64_t half = op.size / 2;
  for (int64_t g = 0; g < op.width; g += op.size) {
    const auto turn = [&](int64_t j, auto n) {
      const Vec first = load_n(x + j, n), second = load_n(x + j + half, n);
      const Vec from_second = mul(second, load_n(op.second + j, n));
      store_n(x + j, sub(mul(first, load_n(op.first + j, n)), from_second), n);
      const Vec from_first = mul(first, load_n(op.second + j + half, n));
      store_n(x + j + half, fma(second, load_n(op.first + j + half, n), from_first), n);
    };
    each_vector(half, [&](int64_t j, auto n) { turn(g + j, n); });
  }
}

template <typename T>
inline void change_row(const ChangeOp& op, T* x) {
  switch (op.kind) {
    case ChangeKind::kAdd:
      return each_vector(op.width, [&](int64_t j, auto n) {
        store_n(x + j, add(load_n(x + j, n), load_n(op.first + j, n)), n);
      });
    case ChangeKind::kScale:
      if (op.second) return turn_groups(op, x);
      return each_vector(op.width, [&](int64_t j, auto n) {
        store_n(x + j, mul(load_n(x + j, n), load_n(op.first + j, n)), n);
      });
    case ChangeKind::kAround:
      return each_vector(op.width, [&](int64_t j, auto n) {
        const Vec middle = op.second ? load_n(op.second + j, n) : zero();
        store_n(x + j, add(mul(sub(load_n(x + j, n), middle), load_n(op.first + j, n)), middle), n);
      });
    case ChangeKind::kBlocks:
      return;  // handled for several rows together
  }
}

// rows: pointers to N rows.
template <int N, typename T>
inline void multiply_block(const float* block, int64_t size, T* const* rows, float* from) {
  for (int r = 0; r < N; ++r)
    each_vector(size, [&](int64_t j, auto n) { store_n(from + r * size + j, load_n(rows[r] + j, n), n); });
  each_vector(size, [&](int64_t j, auto n) {
    Vec sums[N];
    for (int r = 0; r < N; ++r) sums[r] = zero();
    for (int64_t i = 0; i < size; ++i) {
      const Vec own = load_n(block + i * size + j, n);
      for (int r = 0; r < N; ++r) sums[r] = fma(set1(from[r * size + i]), own, sums[r]);
    }
    for (int r = 0; r < N; ++r) store_n(rows[r] + j, sums[r], n);
  });
}

template <typename T>
inline void multiply_blocks(const ChangeOp& op, const Matrix& x, const int64_t* rows, int64_t num_rows) {
  float* const from = scratch(kBlockRows * op.size);
  for (int64_t first = 0; first < op.width; first += op.size) {
    const float* block = op.first + first * op.size;
    for (int64_t r = 0; r < num_rows; r += kBlockRows) {
      with_size<kBlockRows>(min(kBlockRows, num_rows - r), [&]<int N>() {
        T* at[N];
        for (int i = 0; i < N; ++i) at[i] = static_cast<T*>(x.data) + rows[r + i] * x.stride + first;
        multiply_block<N>(block, op.size, at, from);
      });
    }
  }
}

template <typename T>
inline void change_rows(const Matrix& x, const ChangeTask& task) {
  for (int64_t o = 0; o < task.num_ops; ++o) {
    const ChangeOp& op = task.ops[o];
    if (op.kind == ChangeKind::kBlocks) {
      multiply_blocks<T>(op, x, task.rows, task.num_rows);
      continue;
    }
    for (int64_t r = 0; r < task.num_rows; ++r) change_row(op, static_cast<T*>(x.data) + task.rows[r] * x.stride);
  }
}

void change(const ChangeArgs& args) {
  run(args.num_runs, [&](int64_t i) {
    with_dtype(args.dtype, [&]<typename T>() {
      const int64_t end = args.num_tasks * (i + 1) / args.num_runs;
      for (int64_t t = args.num_tasks * i / args.num_runs; t < end; ++t) change_rows<T>(args.x, args.tasks[t]);
    });
  });
}
