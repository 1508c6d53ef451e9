// Gate coefficients of one chunk and their backward: ../../gates.py for one row. A row has the columns
// [W_0 | S_0 | e_1 ... e_T], so that `weight` and `momentum` are T x (T + 2).
#pragma once

#include <algorithm>

#include "elementwise.h"

namespace titans {

template <class T>
struct Coefficients {
    Matrix<T> weight, momentum;
    Matrix<T> anchors, anchor_momenta;  // the first two columns of `weight`: A and B of each token
    int tokens, width;

    Coefficients(Arena<T>& arena, int tokens)
        : weight(arena.matrix(tokens, tokens + 2)), momentum(arena.matrix(tokens, tokens + 2)),
          anchors(arena.matrix(1, tokens)), anchor_momenta(arena.matrix(1, tokens)), tokens(tokens), width(tokens + 2) {
    }

    // keep, eta, theta: of the chunk's tokens; eta may be null: no momentum
    void fill(const T* keep, const T* eta, const T* theta) {
        std::fill(weight.at, weight.at + weight.size(), T(0));
        std::fill(momentum.at, momentum.at + momentum.size(), T(0));
        for (int t = 0; t < tokens; t++) {
            T *m = momentum.row(t), *w = weight.row(t);
            if (eta && t == 0) m[1] = eta[0];
            if (eta && t > 0)
                for (int i = 1; i < t + 2; i++) m[i] = eta[t] * momentum.row(t - 1)[i];
            m[t + 2] = theta[t];
            if (t == 0) w[0] = keep[0];
            for (int i = 0; i < t + 3; i++) w[i] = m[i] + (t ? keep[t] * weight.row(t - 1)[i] : w[i]);
            anchors.at[t] = w[0], anchor_momenta.at[t] = w[1];
        }
    }

    T* anchor() const { return anchors.at; }
    T* anchor_momentum() const { return anchor_momenta.at; }
    T end_anchor() const { return weight.row(tokens - 1)[0]; }
    T end_anchor_momentum() const { return weight.row(tokens - 1)[1]; }
    T end_momentum() const { return momentum.row(tokens - 1)[1]; }
    T* end_writes() const { return weight.row(tokens - 1) + 2; }            // C of the last token
    T* end_momentum_writes() const { return momentum.row(tokens - 1) + 2; }  // F of the last token

    // to = x * C, zero above the diagonal; x: T x T
    void mask(const Matrix<T>& x, const Matrix<T>& to) const {
        for (int t = 0; t < tokens; t++) {
            const T *c = weight.row(t) + 2, *from = x.row(t);
            T* out = to.row(t);
            for (int i = 0; i <= t; i++) out[i] = from[i] * c[i];
            std::fill(out + t + 1, out + tokens, T(0));
        }
    }
};

// Gradients in the layout of the coefficients: of all weight rows, and of the last momentum row.
template <class T>
struct CoefficientGradients {
    Matrix<T> weight, last, other;

    CoefficientGradients(Arena<T>& arena, int tokens)
        : weight(arena.matrix(tokens, tokens + 2)), last(arena.matrix(1, tokens + 2)),
          other(arena.matrix(1, tokens + 2)) {}

    void clear() {
        std::fill(weight.at, weight.at + weight.size(), T(0));
        std::fill(last.at, last.at + last.size(), T(0));
    }

    // Gradients of the gates of the chunk's tokens; uses up what is here.
    void pull(const Coefficients<T>& c, const T* keep, const T* eta, T* d_keep, T* d_eta, T* d_theta) {
        const int tokens = c.tokens;
        T *sigma = last.at, *next = other.at;  // adjoint of the momentum row; lambda is that of the weight row
        for (int i = 0; i < c.width; i++) sigma[i] += weight.row(tokens - 1)[i];
        for (int t = tokens - 1; t >= 0; t--) {
            const T* lambda = weight.row(t);
            d_theta[t] = sigma[t + 2];
            if (t == 0) {
                d_keep[0] = lambda[0];
                if (eta) d_eta[0] = sigma[1];
                return;
            }
            const T *w = c.weight.row(t - 1), *m = c.momentum.row(t - 1);
            T* before = weight.row(t - 1);
            d_keep[t] = dot(lambda, w, t + 2);
            for (int i = 0; i < t + 2; i++) before[i] += keep[t] * lambda[i];
            if (eta) d_eta[t] = dot(sigma, m, t + 2);
            for (int i = 0; i < t + 2; i++) next[i] = before[i] + (eta ? eta[t] * sigma[i] : T(0));
            std::swap(sigma, next);
        }
    }
};

}  // namespace titans
