// Backward of one chunk of one row: ../../chunk_backward.py, with the same names and in the same order.
#pragma once

#include "chunk.h"

namespace titans {

// Working space, and the gradients of the chunk: neg_x and neg_delta are negated, since both enter with a minus.
template <class T>
struct Backward {
    Matrices<T> neg_x, neg_delta, d_y;  // d_y[l]: of the read's output at layer l
    Matrix<T> wide, through, scores, masked, d_u, d_x;
    Matrix<T> d_gain, d_bias;  // of this chunk: added token by token to a sum over many, they would lose digits
    CoefficientGradients<T> rows;

    Backward(Arena<T>& arena, const Options<T>& o, int tokens) : rows(arena, tokens) {
        int widest = 0;
        for (int l = 0; l < o.depth(); l++) {
            neg_x.push_back(o.input(arena, l, tokens));
            neg_delta.push_back(o.input(arena, l + 1, tokens));
            d_y.push_back(o.input(arena, l + 1, tokens));
            widest = std::max({widest, o.sizes[l], o.sizes[l + 1]});
        }
        wide = arena.matrix(tokens, widest);
        through = arena.matrix(tokens, widest);
        scores = arena.matrix(tokens, tokens);
        masked = arena.matrix(tokens, tokens);
        d_u = arena.matrix(tokens, o.sizes[0]);
        d_x = arena.matrix(tokens, o.sizes[0]);
        d_gain = arena.matrix(1, o.sizes[0]);
        d_bias = arena.matrix(1, o.sizes[0]);
    }
};

// The adjoint of the state's own move over the chunk, and the gradients of its four coefficients.
template <class T>
void state_backward(const Options<T>& o, const Coefficients<T>& c, const State<T>& at, const State<T>& adj,
                    CoefficientGradients<T>& rows) {
    T* last_row = rows.weight.row(c.tokens - 1);
    const Vec<T> anchor(c.end_anchor()), anchor_momentum(c.end_anchor_momentum()), momentum(c.end_momentum());
    Vec<T> d_anchor(0), d_anchor_momentum(0), d_momentum(0);
    for (int l = 0; l < o.depth(); l++)
        by_vectors<T>(at.w[l].size(), [&](int64_t i, int64_t n) {
            const auto w = Vec<T>::loadu(at.w[l].at + i, n), vw = Vec<T>::loadu(adj.w[l].at + i, n);
            d_anchor = d_anchor + vw * w;
            (vw * anchor).store(adj.w[l].at + i, n);
            if (!o.momentum) return;
            const auto s = Vec<T>::loadu(at.s[l].at + i, n), vs = Vec<T>::loadu(adj.s[l].at + i, n);
            d_anchor_momentum = d_anchor_momentum + vw * s;
            d_momentum = d_momentum + vs * s;
            (vs * momentum + vw * anchor_momentum).store(adj.s[l].at + i, n);
        });
    last_row[0] += total(d_anchor);
    last_row[1] += total(d_anchor_momentum);
    rows.last.at[1] += total(d_momentum);
}

template <class T>
void update_backward(const Options<T>& o, const Coefficients<T>& c, const State<T>& at, const Inner<T>& s,
                     const State<T>& adj, Backward<T>& b) {
    for (int l = 0; l < o.depth(); l++) {
        const Matrix<T>&x = s.x[l], &delta = s.delta[l];
        const bool in = o.narrow_in(l);
        const Matrix<T>&narrow = in ? x : delta, &neg_narrow = in ? b.neg_x[l] : b.neg_delta[l];
        const Matrix<T>&other = in ? delta : x, &neg_other = in ? b.neg_delta[l] : b.neg_x[l];
        const Matrix<T> through = narrow.over(b.through.at), scaled = narrow.over(b.wide.at);
        for (int of = 0; of < 1 + o.momentum; of++) {
            const T* scale = of ? c.end_momentum_writes() : c.end_writes();
            T* d_scale = of ? b.rows.last.at + 2 : b.rows.weight.row(c.tokens - 1) + 2;
            const Matrix<T>& adjoint = of ? adj.s[l] : adj.w[l];
            product(other, in ? adjoint.t() : adjoint, through);
            add_row_sums(through, narrow, T(-1), d_scale, 1);
            scale_rows(scale, through, neg_narrow, of);
            scale_rows(scale, narrow, scaled);
            product(scaled, in ? adjoint : adjoint.t(), neg_other, T(1), T(of));
        }
    }
    state_backward(o, c, at, adj, b.rows);
}

// Leaves the gradient of q in d_q; d_out is that of the last layer's output.
template <class T>
void read_backward(const Options<T>& o, const Coefficients<T>& c, const State<T>& at, const Inner<T>& s,
                   const Read<T>& r, const State<T>& adj, Matrix<T> d_out, const Matrix<T>& d_q, Backward<T>& b) {
    for (int l = o.depth() - 1; l >= 0; l--) {
        const Matrix<T>&y = r.y[l], &x = s.x[l], &delta = s.delta[l], &d_y = l ? b.d_y[l - 1] : d_q;
        lower_scores(d_out, delta, b.scores);
        for (int t = 0; t < c.tokens; t++) {
            const T *score = r.scores[l].row(t), *d_score = b.scores.row(t);
            T* to = b.rows.weight.row(t) + 2;
            for (int i = 0; i <= t; i++) to[i] -= score[i] * d_score[i];
        }
        c.mask(b.scores, b.scores);
        c.mask(r.scores[l], b.masked);
        add_lower_turned(b.masked, d_out, b.neg_delta[l]);
        add_lower_turned(b.scores, y, b.neg_x[l]);
        lower_product(b.scores, x, d_y, T(-1));
        for (int of = 0; of < 1 + o.momentum; of++) {
            const T* scale = of ? c.anchor_momentum() : c.anchor();
            T* d_scale = b.rows.weight.at + of;
            const Matrix<T>&weight = of ? at.s[l] : at.w[l], &adjoint = of ? adj.s[l] : adj.w[l];
            const bool in = o.narrow_in(l);
            const Matrix<T> through = y.over(b.through.at), scaled = (in ? y : d_out).over(b.wide.at);
            product(d_out, weight.t(), through);
            add_row_sums(through, y, T(1), d_scale, c.width);
            scale_rows(scale, through, d_y, true);
            scale_rows(scale, in ? y : d_out, scaled);
            product((in ? scaled : y).t(), in ? d_out : scaled, adjoint, T(1), T(1));
        }
        if (l)
            for (int64_t i = 0; i < d_y.size(); i++) d_y.at[i] *= r.slope[l - 1].at[i];
        d_out = d_y;
    }
}

// Of the norm inside the memory, from the negated gradient of the last delta: leaves that of the last layer's output in
// b.d_x and the gradient of v in d_v; takes from b.d_gain and b.d_bias.
template <class T>
void norm_backward(const Options<T>& o, const Norm<T>& norm, const Inner<T>& s, Backward<T>& b, const Matrix<T>& d_v) {
    const int d = o.sizes[0];
    T *d_gain = b.d_gain.at, *d_bias = b.d_bias.at;
    const Matrix<T>&delta = s.delta.back(), &neg_delta = b.neg_delta.back();
    for (int t = 0; t < delta.rows; t++) {
        const T *x = s.value.row(t), *error = s.error.row(t), *pulled = delta.row(t), *d_pulled = neg_delta.row(t);
        const T rstd = s.rstd.at[t];
        T *u = b.wide.at, *neg_u = b.d_u.row(t), *out = b.d_x.row(t), *dv = d_v.row(t);
        for (int i = 0; i < d; i++) u[i] = norm.gain[i] * error[i];
        pull_row(d_pulled, x, rstd, neg_u, d);
        for (int i = 0; i < d; i++) dv[i] = norm.gain[i] * neg_u[i];
        // out = pull of both: what reaches the normalised value through the pull, and through the error
        const T along = dot(u, x, d) / d, d_along = dot(d_pulled, x, d) / d;
        const T through_rstd = -dot(d_pulled, pulled, d) * rstd / d;
        for (int i = 0; i < d; i++)
            out[i] = norm.gain[i] * dv[i] - rstd * (d_pulled[i] * along + u[i] * d_along);
        pull_row(out, x, rstd, out, d);
        for (int i = 0; i < d; i++) out[i] += through_rstd * x[i];
        for (int i = 0; i < d; i++) d_gain[i] -= neg_u[i] * error[i] + dv[i] * x[i];
        for (int i = 0; i < d; i++) d_bias[i] -= dv[i];
    }
}

// Leaves the gradients of k and v in d_k and d_v; adds to adj, the adjoints of `at`.
template <class T, class Activation>
void inner_backward(const Options<T>& o, const Norm<T>& norm, const State<T>& at, const Inner<T>& s,
                    const State<T>& adj, Backward<T>& b, const Matrix<T>& d_k, const Matrix<T>& d_v) {
    const int depth = o.depth(), d = o.sizes[0];
    for (int l = 1; l < depth; l++) {  // D_l = (D_{l+1} W_{l+1}') f'(Z_l), innermost last
        const Matrix<T>&neg = b.neg_delta[l - 1], neg_back = neg.over(b.wide.at);
        by_vectors<T>(neg.size(), [&](int64_t i, int64_t n) {
            const auto d_delta = Vec<T>::loadu(neg.at + i, n);
            const auto curvature = Activation::of(Vec<T>::loadu(s.pre[l - 1].at + i, n)).curvature;
            (d_delta * Vec<T>::loadu(s.slope[l - 1].at + i, n)).store(neg_back.at + i, n);
            // from here on neg_delta[l - 1] is the negated gradient of Z_l
            (curvature * Vec<T>::loadu(s.back[l - 1].at + i, n) * d_delta).store(neg.at + i, n);
        });
        product(neg_back, at.w[l], b.neg_delta[l], T(1), T(1));
        product(neg_back.t(), s.delta[l], adj.w[l], T(-1), T(1));
    }
    Matrix<T> neg_out = b.neg_delta[depth - 1];
    if (o.norm) {
        norm_backward(o, norm, s, b, d_v);
        neg_out = b.d_x;
    } else {
        for (int t = 0; t < neg_out.rows; t++) std::copy(neg_out.row(t), neg_out.row(t) + d, d_v.row(t));
    }
    for (int l = depth - 1; l >= 0; l--) {
        product(neg_out, at.w[l].t(), b.neg_x[l], T(1), T(1));
        product(s.x[l].t(), neg_out, adj.w[l], T(-1), T(1));
        if (!l) break;
        neg_out = b.neg_delta[l - 1];
        for (int64_t i = 0; i < neg_out.size(); i++) neg_out.at[i] += b.neg_x[l].at[i] * s.slope[l - 1].at[i];
    }
    for (int t = 0; t < d_k.rows; t++) {
        const T *neg = b.neg_x[0].row(t), *dv = d_v.row(t);
        T* to = d_k.row(t);
        for (int i = 0; i < d; i++) to[i] = -neg[i] - (o.norm ? dv[i] : T(0));
    }
}

// adj: adjoints of the state after the tokens, which leave as those before them; d_anchor: of `anchor`, at which the
// inner gradients were taken, which is added to. Adds to d_gain and d_bias.
template <class T, class Activation>
void chunk_backward(const Options<T>& o, const Norm<T>& norm, const Coefficients<T>& c, const State<T>& at,
                    const State<T>& anchor, const Inner<T>& s, const Read<T>& r, const State<T>& adj,
                    const State<T>& d_anchor, const Matrix<T>& d_y, Backward<T>& b, const Matrix<T>& d_q,
                    const Matrix<T>& d_k, const Matrix<T>& d_v, T* d_gain, T* d_bias) {
    const int d = o.sizes[0];
    b.rows.clear();
    for (const auto& x : {b.d_gain, b.d_bias}) std::fill(x.at, x.at + d, T(0));
    update_backward(o, c, at, s, adj, b);
    Matrix<T> d_out = d_y;
    if (o.norm) {
        d_out = b.d_y.back();
        for (int t = 0; t < d_y.rows; t++) {
            const T *dy = d_y.row(t), *x = r.value.row(t);
            T* out = d_out.row(t);
            for (int i = 0; i < d; i++) out[i] = norm.gain[i] * dy[i];
            pull_row(out, x, r.rstd.at[t], out, d);
            for (int i = 0; i < d; i++) b.d_gain.at[i] += dy[i] * x[i];
            for (int i = 0; i < d; i++) b.d_bias.at[i] += dy[i];
        }
    }
    read_backward(o, c, at, s, r, adj, d_out, d_q, b);
    if (o.norm)
        for (int t = 0; t < d_y.rows; t++)
            for (int i = 0; i < d; i++) d_q.row(t)[i] += d_y.row(t)[i];
    inner_backward<T, Activation>(o, norm, anchor, s, d_anchor, b, d_k, d_v);
    for (int i = 0; o.norm && i < d; i++) d_gain[i] += b.d_gain.at[i], d_bias[i] += b.d_bias.at[i];
}

}  // namespace titans
