// Matrices, row major, and their product by the BLAS that PyTorch comes with.
#pragma once

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
    T* row(int r) const { return at + static_cast<int64_t>(r) * stride; }
    int64_t size() const { return static_cast<int64_t>(rows) * cols; }
};

template <class T>
using Matrices = std::vector<Matrix<T>>;

// c = alpha a b + beta c. The BLAS counts by columns, so that it is told of c' = b' a'.
template <class T>
void product(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& c, T alpha = 1, T beta = 0) {
    const char* of_b = b.flipped ? "T" : "N";
    const char* of_a = a.flipped ? "T" : "N";
    if constexpr (sizeof(T) == 4)
        sgemm_(of_b, of_a, &c.cols, &c.rows, &a.cols, &alpha, b.at, &b.stride, a.at, &a.stride, &beta, c.at, &c.stride);
    else
        dgemm_(of_b, of_a, &c.cols, &c.rows, &a.cols, &alpha, b.at, &b.stride, a.at, &a.stride, &beta, c.at, &c.stride);
}

// Matrices one after the other in memory; without memory it counts how much they need.
template <class T>
class Arena {
  public:
    int64_t used = 0;

    Arena() = default;
    explicit Arena(T* memory) : memory(memory) {}
    Matrix<T> matrix(int rows, int cols) {
        Matrix<T> made(memory ? memory + used : nullptr, rows, cols);
        used += (made.size() + 15) / 16 * 16;
        return made;
    }

  private:
    T* memory = nullptr;
};

}  // namespace titans
