// What is not a product: activations with their two derivatives, rows scaled and summed, the norm inside the memory.
#pragma once

#include <cmath>

#include "products.h"

namespace titans {

template <class T>
using Vec = at::vec::Vectorized<T>;

// f(i, n) for vectors of numbers from i, of which n count
template <class T, class F>
inline void by_vectors(int64_t size, F f) {
    constexpr int64_t width = Vec<T>::size();
    int64_t i = 0;
    for (; i + width <= size; i += width) f(i, width);
    if (i < size) f(i, size - i);
}

template <class T>
struct Jet {
    Vec<T> value, slope, curvature;
};

template <class T>
struct Silu {
    static Jet<T> of(const Vec<T>& z) {
        const Vec<T> one(1), s = one / (one + z.neg().exp());
        const Vec<T> x = z * s, rest = one - s;
        return {x, s + x * rest, s * rest * (Vec<T>(2) + z - Vec<T>(2) * x)};
    }
};

template <class T>
struct Gelu {
    static Jet<T> of(const Vec<T>& z) {
        const Vec<T> half(0.5), cdf = half * (Vec<T>(1) + (z * Vec<T>(M_SQRT1_2)).erf());
        const Vec<T> square = z * z, pdf = (square * Vec<T>(-0.5)).exp() * Vec<T>(0.5 * M_2_SQRTPI * M_SQRT1_2);
        return {z * cdf, cdf + z * pdf, pdf * (Vec<T>(2) - square)};
    }
};

template <class T>
T dot(const T* a, const T* b, int64_t size) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += a[i] * b[i];
    return sum;
}

template <class T>
T total(const T* a, int64_t size) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += a[i];
    return sum;
}

template <class T>
T total(const Vec<T>& x) {
    T numbers[Vec<T>::size()];
    x.store(numbers);
    return total(numbers, Vec<T>::size());
}

// to = diag(scale) x, or added to it; both in one order
template <class T>
void scale_rows(const T* scale, const Matrix<T>& x, const Matrix<T>& to, bool add = false) {
    const int rows = x.flipped ? x.cols : x.rows, cols = x.flipped ? x.rows : x.cols;
    for (int r = 0; r < rows; r++) {
        const T* from = x.row(r);
        T* out = to.row(r);
        if (x.flipped && add)
            for (int i = 0; i < cols; i++) out[i] += scale[i] * from[i];
        else if (x.flipped)
            for (int i = 0; i < cols; i++) out[i] = scale[i] * from[i];
        else if (add)
            for (int i = 0; i < cols; i++) out[i] += scale[r] * from[i];
        else
            for (int i = 0; i < cols; i++) out[i] = scale[r] * from[i];
    }
}

// to[r] += sign <x_r, y_r>; to: a number per row, `step` apart
template <class T>
void add_row_sums(const Matrix<T>& x, const Matrix<T>& y, T sign, T* to, int step) {
    if (!x.flipped) {
        for (int r = 0; r < x.rows; r++) to[static_cast<int64_t>(r) * step] += sign * dot(x.row(r), y.row(r), x.cols);
        return;
    }
    for (int j = 0; j < x.cols; j++)
        for (int r = 0; r < x.rows; r++) to[static_cast<int64_t>(r) * step] += sign * x.row(j)[r] * y.row(j)[r];
}

// LayerNorm without gain: value and 1 / standard deviation of each row; z may be value.
template <class T>
void normalise(const Matrix<T>& z, double eps, const Matrix<T>& value, T* rstd) {
    for (int r = 0; r < z.rows; r++) {
        const T* from = z.row(r);
        T* to = value.row(r);
        const T mean = total(from, z.cols) / z.cols;
        for (int i = 0; i < z.cols; i++) to[i] = from[i] - mean;
        rstd[r] = 1 / std::sqrt(dot(to, to, z.cols) / z.cols + static_cast<T>(eps));
        for (int i = 0; i < z.cols; i++) to[i] *= rstd[r];
    }
}

// The adjoint of that, which is its derivative too: to = rstd (u - mean u - x mean(u x)); to may be u.
template <class T>
void pull_row(const T* u, const T* x, T rstd, T* to, int d) {
    const T mean = total(u, d) / d, along = dot(u, x, d) / d;
    for (int i = 0; i < d; i++) to[i] = rstd * (u[i] - mean - x[i] * along);
}

}  // namespace titans
