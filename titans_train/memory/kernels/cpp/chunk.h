// One chunk of one row (a head of a sequence), forward: ../../chunk.py, with the same names. T tokens; d width of a
// head; layer l maps sizes[l] to sizes[l + 1]. Gates scale the narrower side of a product. What is as wide as a hidden
// layer is stored flipped, [hidden, T], and so are the first layer's weights: nearly all products are then of the
// orders in which the BLAS is quick.
#pragma once

#include "coefficients.h"

namespace titans {

template <class T>
struct Options {
    std::vector<int> sizes;  // d, hidden ..., d
    bool momentum, norm;
    double eps;  // of the norm

    int depth() const { return static_cast<int>(sizes.size()) - 1; }
    bool narrow_in(int l) const { return sizes[l] <= sizes[l + 1]; }
    bool hidden(int l) const { return l > 0 && l < depth(); }  // the input of layer l
    Matrix<T> weight(Arena<T>& arena, int l) const {
        return arena.matrix(sizes[l], sizes[l + 1], !hidden(l) && hidden(l + 1));
    }
    Matrix<T> input(Arena<T>& arena, int l, int tokens) const { return arena.matrix(tokens, sizes[l], hidden(l)); }
};

template <class T>
struct State {
    Matrices<T> w, s;

    State() = default;
    State(Arena<T>& arena, const Options<T>& o, bool momentum) {
        for (int l = 0; l < o.depth(); l++) {
            w.push_back(o.weight(arena, l));
            if (momentum) s.push_back(o.weight(arena, l));
        }
    }
    // What of `other` this has
    void take(const State& other) const {
        for (size_t l = 0; l < w.size(); l++) copy(other.w[l], w[l]);
        for (size_t l = 0; l < s.size(); l++) copy(other.s[l], s[l]);
    }
    // Adds this to `other`, and leaves zeros
    void move_to(const State& other) const {
        for (size_t l = 0; l < w.size(); l++) move(w[l], other.w[l]);
        for (size_t l = 0; l < s.size(); l++) move(s[l], other.s[l]);
    }
};

template <class T>
struct Norm {
    const T *gain, *bias;  // [d]
};

// What the inner gradients of a chunk are made of, for its update, its read and its backward.
template <class T>
struct Inner {
    Matrices<T> x, pre, slope, back, delta;  // X, Z, f'(Z), G and D; x[0] is k
    Matrix<T> error, value, rstd;            // with a norm: M(k) - v and the norm of the last layer's output

    Inner(Arena<T>& arena, const Options<T>& o, int tokens) {
        x.emplace_back();
        for (int l = 0; l < o.depth(); l++) {
            delta.push_back(o.input(arena, l + 1, tokens));
            if (l + 1 == o.depth()) break;
            for (auto* each : {&x, &pre, &slope, &back}) each->push_back(o.input(arena, l + 1, tokens));
        }
        if (!o.norm) return;
        error = arena.matrix(tokens, o.sizes[0]);
        value = arena.matrix(tokens, o.sizes[0]);
        rstd = arena.matrix(tokens, 1);
    }
};

// What the read of a chunk is made of, for its backward.
template <class T>
struct Read {
    Matrices<T> y, pre, slope;   // inputs of each layer, y[0] is q; what came before them, and f' of it
    Matrices<T> scores;          // Y X'
    Matrix<T> value, rstd;       // the norm of the last layer's output
    Matrix<T> scaled, masked;    // working space: one side of a layer scaled, T x T

    Read(Arena<T>& arena, const Options<T>& o, int tokens) {
        int widest = 0;
        y.emplace_back();
        for (int l = 0; l < o.depth(); l++) {
            widest = std::max({widest, o.sizes[l], o.sizes[l + 1]});
            scores.push_back(arena.matrix(tokens, tokens));
            if (l + 1 == o.depth()) break;
            for (auto* each : {&y, &pre, &slope}) each->push_back(o.input(arena, l + 1, tokens));
        }
        value = arena.matrix(tokens, o.sizes.back());
        rstd = arena.matrix(tokens, 1);
        scaled = arena.matrix(tokens, widest);
        masked = arena.matrix(tokens, tokens);
    }
};

// Forward of the keys and gradient of 1/2 |M(k) - v|^2 at the weights of `at`, those before the chunk.
template <class T, class Activation>
void inner_gradients(const Options<T>& o, const Norm<T>& norm, const Matrix<T>& k, const Matrix<T>& v,
                     const State<T>& at, Inner<T>& s) {
    const int last = o.depth() - 1, d = o.sizes[0];
    s.x[0] = k;
    for (int l = 0; l < last; l++) {
        product(s.x[l], at.w[l], s.pre[l]);
        by_vectors<T>(s.pre[l].size(), [&](int64_t i, int64_t n) {
            const auto jet = Activation::of(Vec<T>::loadu(s.pre[l].at + i, n));
            jet.value.store(s.x[l + 1].at + i, n);
            jet.slope.store(s.slope[l].at + i, n);
        });
    }
    const Matrix<T>& out = s.delta[last];
    product(s.x[last], at.w[last], out);
    if (o.norm) normalise(out, o.eps, s.value, s.rstd.at);
    for (int r = 0; r < k.rows; r++) {
        T* delta = out.row(r);
        const T *key = k.row(r), *value = v.row(r);
        if (!o.norm) {
            for (int i = 0; i < d; i++) delta[i] -= value[i];
            continue;
        }
        T *error = s.error.row(r), *x = s.value.row(r);
        for (int i = 0; i < d; i++) error[i] = norm.bias[i] + key[i] + norm.gain[i] * x[i] - value[i];
        for (int i = 0; i < d; i++) delta[i] = norm.gain[i] * error[i];
        pull_row(delta, x, s.rstd.at[r], delta, d);
    }
    for (int l = last; l > 0; l--) {
        product(s.delta[l], at.w[l].t(), s.back[l - 1]);
        const T *back = s.back[l - 1].at, *slope = s.slope[l - 1].at;
        T* delta = s.delta[l - 1].at;
        for (int64_t i = 0; i < s.back[l - 1].size(); i++) delta[i] = back[i] * slope[i];
    }
}

// Norm of each token's inner gradient over all layers, sqrt(sum_l |x_l|^2 |delta_l|^2): to [T]. working: [2 T]
template <class T>
void surprise(const Options<T>& o, const Inner<T>& s, T* working, T* to) {
    const int tokens = s.x[0].rows;
    std::fill(to, to + tokens, T(0));
    for (int l = 0; l < o.depth(); l++) {
        std::fill(working, working + 2 * tokens, T(0));
        add_row_sums(s.x[l], s.x[l], T(1), working, 1);
        add_row_sums(s.delta[l], s.delta[l], T(1), working + tokens, 1);
        for (int t = 0; t < tokens; t++) to[t] += working[t] * working[tokens + t];
    }
    for (int t = 0; t < tokens; t++) to[t] = std::sqrt(to[t]);
}

// One layer of the read; r.scores[l] and the inputs are there.
template <class T>
void read_layer(const Options<T>& o, const Coefficients<T>& c, const State<T>& at, const Inner<T>& s, const Read<T>& r,
                int l, const Matrix<T>& out) {
    for (int of = 0; of < 1 + o.momentum; of++) {
        const T* scale = of ? c.anchor_momentum() : c.anchor();
        const Matrix<T>& weight = of ? at.s[l] : at.w[l];
        const Matrix<T> scaled = (o.narrow_in(l) ? r.y[l] : out).over(r.scaled.at);
        if (o.narrow_in(l)) {
            scale_rows(scale, r.y[l], scaled);
            product(scaled, weight, out, T(1), T(of));
        } else {
            product(r.y[l], weight, scaled);
            scale_rows(scale, scaled, out, of);
        }
    }
    c.mask(r.scores[l], r.masked);
    lower_product(r.masked, s.delta[l], out, T(-1), T(1));
}

// The causal read of every token: y_out [T, d]; or only r, for the backward, with y_out as working space.
template <class T, class Activation>
void chunk_read(const Options<T>& o, const Norm<T>& norm, const Coefficients<T>& c, const Matrix<T>& q,
                const State<T>& at, const Inner<T>& s, Read<T>& r, const Matrix<T>& y_out, bool only_r = false) {
    const int last = o.depth() - 1, d = o.sizes[0];
    r.y[0] = q;
    for (int l = 0; l <= last; l++) {
        lower_scores(r.y[l], s.x[l], r.scores[l]);
        if (l == last && only_r && !o.norm) return;
        read_layer(o, c, at, s, r, l, l == last ? y_out : r.pre[l]);
        if (l == last) break;
        by_vectors<T>(r.pre[l].size(), [&](int64_t i, int64_t n) {
            const auto jet = Activation::of(Vec<T>::loadu(r.pre[l].at + i, n));
            jet.value.store(r.y[l + 1].at + i, n);
            jet.slope.store(r.slope[l].at + i, n);
        });
    }
    if (!o.norm) return;
    normalise(y_out, o.eps, r.value, r.rstd.at);
    if (only_r) return;
    for (int t = 0; t < q.rows; t++) {
        const T *query = q.row(t), *x = r.value.row(t);
        T* y = y_out.row(t);
        for (int i = 0; i < d; i++) y[i] = norm.bias[i] + query[i] + norm.gain[i] * x[i];
    }
}

// Moves the state over the chunk, which may be in place. working: space for the narrower side, scaled
template <class T>
void chunk_update(const Options<T>& o, const Coefficients<T>& c, const Inner<T>& s, const State<T>& at,
                  const State<T>& after, const Matrix<T>& working) {
    const Vec<T> anchor(c.end_anchor()), anchor_momentum(c.end_anchor_momentum()), momentum(c.end_momentum());
    for (int l = 0; l < o.depth(); l++) {
        const Matrix<T>&x = s.x[l], &delta = s.delta[l];
        const Matrix<T>& narrow = o.narrow_in(l) ? x : delta;
        const Matrix<T> scaled = narrow.over(working.at);
        by_vectors<T>(at.w[l].size(), [&](int64_t i, int64_t n) {
            const auto w = Vec<T>::loadu(at.w[l].at + i, n) * anchor;
            if (!o.momentum) return w.store(after.w[l].at + i, n);
            const auto m = Vec<T>::loadu(at.s[l].at + i, n);
            (w + m * anchor_momentum).store(after.w[l].at + i, n);
            (m * momentum).store(after.s[l].at + i, n);
        });
        for (int of = 0; of < 1 + o.momentum; of++) {
            scale_rows(of ? c.end_momentum_writes() : c.end_writes(), narrow, scaled);
            const Matrix<T>&left = o.narrow_in(l) ? scaled : x, &right = o.narrow_in(l) ? delta : scaled;
            product(left.t(), right, of ? after.s[l] : after.w[l], T(-1), T(1));
        }
    }
}

}  // namespace titans
