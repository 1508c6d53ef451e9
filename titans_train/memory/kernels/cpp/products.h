// Matrices, row major, and their product by the BLAS that PyTorch comes with.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

extern "C" {
void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*,
            const float*, const int*, const float*, float*, const int*);
void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*, const double*, const int*,
            const double*, const int*, const double*, double*, const int*);
}

namespace titans {

// A view of rows x cols numbers, `stride` apart from row to row; flipped: of the transpose of what is stored.
template <class T>
struct Matrix {
    T* at = nullptr;
    int rows = 0, cols = 0, stride = 0;
    bool flipped = false;

    Matrix() = default;
    Matrix(T* at, int rows, int cols) : at(at), rows(rows), cols(cols), stride(cols) {}
    Matrix(T* at, int rows, int cols, int stride) : at(at), rows(rows), cols(cols), stride(stride) {}

    Matrix t() const {
        Matrix other(at, cols, rows, stride);
        other.flipped = !flipped;
        return other;
    }
    Matrix part(int row, int col, int rows, int cols) const {  // from `row` and `col`
        const int64_t step = stride, first = flipped ? row + col * step : col + row * step;
        Matrix made(at + first, rows, cols, stride);
        made.flipped = flipped;
        return made;
    }
    // of the same shape and order, in other memory
    Matrix over(T* memory) const { return flipped ? Matrix(memory, cols, rows).t() : Matrix(memory, rows, cols); }
    T* row(int r) const { return at + static_cast<int64_t>(r) * stride; }  // of what is stored
    int64_t size() const { return static_cast<int64_t>(rows) * cols; }
};

template <class T>
using Matrices = std::vector<Matrix<T>>;

// What is stored in one order, in the other: to[c][r] = from[r][c].
template <class T>
void turn(const T* from, int rows, int cols, int stride, T* to, int to_stride) {
    constexpr int tile = 16;
    for (int r = 0; r < rows; r += tile)
        for (int c = 0; c < cols; c += tile)
            at::vec::transpose_mxn<T>(from + static_cast<int64_t>(r) * stride + c, stride,
                                      to + static_cast<int64_t>(c) * to_stride + r, to_stride,
                                      std::min(tile, rows - r), std::min(tile, cols - c));
}

template <class T>
void copy(const Matrix<T>& from, const Matrix<T>& to) {
    const int rows = from.flipped ? from.cols : from.rows, cols = from.flipped ? from.rows : from.cols;
    if (from.flipped != to.flipped) return turn(from.at, rows, cols, from.stride, to.at, to.stride);
    for (int r = 0; r < rows; r++) std::copy(from.row(r), from.row(r) + cols, to.row(r));
}

// Adds one to another, and leaves zeros.
template <class T>
void move(const Matrix<T>& from, const Matrix<T>& to) {
    const bool turned = from.flipped != to.flipped;
    const int rows = from.flipped ? from.cols : from.rows, cols = from.flipped ? from.rows : from.cols;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) (turned ? to.row(c)[r] : to.row(r)[c]) += from.row(r)[c];
    std::fill(from.at, from.at + from.size(), T(0));
}

// Products and their FLOPs since this library was loaded: for a check that no clock disturbs.
inline std::atomic<int64_t> products_made{0}, flops_made{0};

// c = alpha a b + beta c. The BLAS is slow where b is flipped, and quick to be given it turned.
template <class T>
void product(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& c, T alpha = 1, T beta = 0) {
    if (c.flipped) return product(b.t(), a.t(), c.t(), alpha, beta);
    products_made.fetch_add(1, std::memory_order_relaxed);
    flops_made.fetch_add(2 * c.size() * a.cols, std::memory_order_relaxed);
    const T* right = b.at;
    int stride = b.stride;
    if (b.flipped) {
        static thread_local std::vector<T> turned;
        turned.resize(b.size());
        turn(b.at, b.cols, b.rows, b.stride, turned.data(), b.cols);
        right = turned.data(), stride = b.cols;
    }
    // it counts by columns, so that it is told of c' = b' a'
    const char* left = a.flipped ? "T" : "N";
    if constexpr (sizeof(T) == 4)
        sgemm_("N", left, &c.cols, &c.rows, &a.cols, &alpha, right, &stride, a.at, &a.stride, &beta, c.at, &c.stride);
    else
        dgemm_("N", left, &c.cols, &c.rows, &a.cols, &alpha, right, &stride, a.at, &a.stride, &beta, c.at, &c.stride);
}

// Products with T x T matrices of which only the lower triangle counts, block by block: half of them is left out, but
// for the blocks on the diagonal. A block of this size is as quick as a larger one.
constexpr int triangle_block = 32;

// f(first, size) for every block of T
template <class F>
void by_blocks(int tokens, F f) {
    for (int first = 0; first < tokens; first += triangle_block) f(first, std::min(triangle_block, tokens - first));
}

// c = a b', T x T: what is above the blocks on the diagonal is left as it was
template <class T>
void lower_scores(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& c) {
    by_blocks(c.rows, [&](int first, int size) {
        const int end = first + size;
        product(a.part(first, 0, size, a.cols), b.part(0, 0, end, b.cols).t(), c.part(first, 0, size, end));
    });
}

// c = alpha a b + beta c; a: T x T, zero above its diagonal
template <class T>
void lower_product(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& c, T alpha, T beta = 0) {
    by_blocks(a.rows, [&](int first, int size) {
        const int end = first + size;
        product(a.part(first, 0, size, end), b.part(0, 0, end, b.cols), c.part(first, 0, size, c.cols), alpha, beta);
    });
}

// c += a' b; a: as above
template <class T>
void add_lower_turned(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& c) {
    by_blocks(a.rows, [&](int first, int size) {
        const int rest = a.rows - first;
        product(a.part(first, first, rest, size).t(), b.part(first, 0, rest, b.cols), c.part(first, 0, size, c.cols),
                T(1), T(1));
    });
}

// Matrices one after the other in memory; without memory it counts how much they need.
template <class T>
class Arena {
  public:
    int64_t used = 0;

    Arena() = default;
    explicit Arena(T* memory) : memory(memory) {}
    Matrix<T> matrix(int rows, int cols, bool flipped = false) {
        Matrix<T> made;
        made.rows = rows, made.cols = cols, made.flipped = flipped;
        made = made.over(memory ? memory + used : nullptr);
        used += (made.size() + 15) / 16 * 16;
        return made;
    }

  private:
    T* memory = nullptr;
};

}  // namespace titans
