// The chunks of a segment, forward and backward, row by row: what a part of a chunk works on fits in a core's cache.
// ../compiled.py builds and calls this. Shapes: rows n = batch * heads, L tokens, d width of a head.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <optional>

#include "chunk_backward.h"

namespace titans {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using Maybe = std::optional<Tensor>;

// Of one call: q, k, v [n, L, d]; gates [n, L]; starts [n, L] bool; a segment's first token, its parts, their tokens,
// and how many make a chunk: inner gradients are those at the weights before it, while the state moves part by part.
struct Call {
    Tensor q, k, v, keep;
    Maybe eta;
    Tensor theta;
    Maybe starts;
    Tensors document;  // weights, then momentum [n, d_in, d_out]
    Maybe gain, bias;  // [n, 1, d]
    int64_t start, parts, tokens, per_chunk;
    bool gelu;
    double eps;

    int64_t opening(int64_t part) const { return part - part % per_chunk; }  // the first of its chunk
};

// What follows reads memory by these sizes. `like`: whose numbers are of the same type.
void fits(const Tensor& x, at::IntArrayRef sizes, const Tensor& like, const char* name) {
    TORCH_CHECK(x.sizes() == sizes, name, " has sizes ", x.sizes(), "; needed are ", sizes);
    TORCH_CHECK(x.device().is_cpu() && x.is_contiguous() && x.scalar_type() == like.scalar_type(), name,
                " is to be contiguous, on the CPU and of ", like.scalar_type());
}

void fits(const Maybe& x, at::IntArrayRef sizes, const Tensor& like, const char* name) {
    if (x) fits(*x, sizes, like, name);
}

// Weights, then momentum (if any), of layers that map d to hidden widths and back to d
void state_fits(const Call& call, const Tensors& state, const Tensors& like, const char* name) {
    const int64_t kinds = call.eta ? 2 : 1, depth = static_cast<int64_t>(state.size()) / kinds, d = call.q.size(2);
    TORCH_CHECK(depth > 0 && state.size() == like.size() && kinds * depth == static_cast<int64_t>(state.size()), name,
                " has ", state.size(), " tensors");
    for (int64_t i = 0; i < kinds * depth; i++) {
        const int64_t l = i % depth, in = l ? like[l - 1].size(2) : d, out = l + 1 == depth ? d : like[l].size(2);
        fits(state[i], {call.q.size(0), in, out}, call.q, name);
    }
}

void call_fits(const Call& call, const Tensors& state) {
    const Tensor& q = call.q;
    TORCH_CHECK(q.dim() == 3 && (q.scalar_type() == at::kFloat || q.scalar_type() == at::kDouble), "q has sizes ",
                q.sizes(), " and type ", q.scalar_type());
    const int64_t n = q.size(0), length = q.size(1), d = q.size(2);
    for (const Tensor& x : {call.q, call.k, call.v}) fits(x, {n, length, d}, q, "q, k or v");
    for (const Maybe& gate : {Maybe(call.keep), call.eta, Maybe(call.theta)}) fits(gate, {n, length}, q, "a gate");
    for (const Maybe& x : {call.gain, call.bias}) fits(x, {n, 1, d}, q, "gain or bias");
    if (call.starts) {
        fits(*call.starts, {n, length}, *call.starts, "starts");
        TORCH_CHECK(call.starts->scalar_type() == at::kBool, "starts are bool");
        state_fits(call, call.document, state, "the document state");
    }
    TORCH_CHECK(call.start >= 0 && call.tokens > 0 && call.start + call.parts * call.tokens <= length, "parts of ",
                call.tokens, " tokens from ", call.start, " leave ", length, " tokens");
    TORCH_CHECK(call.per_chunk > 0 && call.parts % call.per_chunk == 0, call.parts, " parts are no chunks of ",
                call.per_chunk);
    for (const Tensor& x : state) TORCH_CHECK(x.dim() == 3, "a state has sizes ", x.sizes());
    state_fits(call, state, state, "the state");
}

template <class T>
struct Row {
    const Call& call;
    const Options<T>& o;
    int64_t n;

    int64_t first(int64_t part) const { return n * call.q.size(1) + call.start + part * call.tokens; }
    Matrix<T> tokens(const Tensor& x, int64_t part) const {
        return Matrix<T>(x.data_ptr<T>() + first(part) * o.sizes[0], call.tokens, o.sizes[0]);
    }
    T* gates(const Maybe& x, int64_t part) const { return x ? x->template data_ptr<T>() + first(part) : nullptr; }
    T* vector(const Maybe& x) const { return x ? x->template data_ptr<T>() + n * o.sizes[0] : nullptr; }
    Norm<T> norm() const { return {vector(call.gain), vector(call.bias)}; }
    bool starts(int64_t part) const { return call.starts && call.starts->template data_ptr<bool>()[first(part)]; }

    // This row of a state's tensors: weights, then momentum
    State<T> state(const Tensors& tensors) const {
        State<T> made;
        for (int i = 0; i < static_cast<int>(tensors.size()); i++) {
            const int l = i % o.depth(), rows = o.sizes[l], cols = o.sizes[l + 1];
            auto& list = i < o.depth() ? made.w : made.s;
            list.emplace_back(tensors[i].data_ptr<T>() + n * rows * cols, rows, cols);
        }
        return made;
    }
    void fill(Coefficients<T>& c, int64_t j) const {
        c.fill(gates(call.keep, j), gates(call.eta, j), gates(call.theta, j));
    }
};

template <class T>
Options<T> options(const Call& call, const Tensors& state) {
    Options<T> o;
    const int depth = static_cast<int>(state.size()) / (call.eta ? 2 : 1);
    for (int l = 0; l < depth; l++) o.sizes.push_back(state[l].size(1));
    o.sizes.push_back(state[depth - 1].size(2));
    o.momentum = call.eta.has_value();
    o.norm = call.gain.has_value();
    o.eps = call.eps;
    return o;
}

// While it lives, this thread takes numbers below the least normal one for zero: what is left of old momenta gets
// there, where a product is some ten times slower.
class NoDenormals {
#if defined(__x86_64__)
    static constexpr unsigned flush = 0x8040;  // results and operands
    unsigned before = _mm_getcsr();

  public:
    NoDenormals() { _mm_setcsr(before | flush); }
    ~NoDenormals() { _mm_setcsr(before); }
#endif
};

// Calls f(row, working space) for every row, rows spread over the threads.
template <class T, class F>
void by_rows(const Call& call, const Options<T>& o, int64_t space, F f) {
    at::parallel_for(0, call.q.size(0), 1, [&](int64_t begin, int64_t end) {
        const NoDenormals here;
        const Tensor memory = at::empty({space}, call.q.options());
        for (int64_t n = begin; n < end; n++) f(Row<T>{call, o, n}, Arena<T>(memory.data_ptr<T>()));
    });
}

template <class T>
struct ForwardSpace {
    State<T> at, anchor;
    Coefficients<T> c;
    Inner<T> inner;
    Read<T> read;
    Matrix<T> squares;

    ForwardSpace(Arena<T>& arena, const Options<T>& o, const Call& call)
        : at(arena, o, o.momentum), anchor(call.per_chunk == 1 ? at : State<T>(arena, o, false)), c(arena, call.tokens),
          inner(arena, o, call.tokens), read(arena, o, call.tokens), squares(arena.matrix(2, call.tokens)) {}
};

template <class T, class Activation>
void forward_rows(const Call& call, const Tensors& state, const Tensor& y, const Maybe& surprises) {
    const Options<T> o = options<T>(call, state);
    Arena<T> counted;
    ForwardSpace<T>(counted, o, call);
    by_rows<T>(call, o, counted.used, [&](const Row<T>& row, Arena<T> arena) {
        ForwardSpace<T> space(arena, o, call);
        const State<T>&at = space.at, &anchor = space.anchor, given = row.state(state),
                      document = row.state(call.document);
        const Norm<T> norm = row.norm();
        at.take(given);
        for (int64_t j = 0; j < call.parts; j++) {
            if (row.starts(j)) at.take(document);
            if (call.per_chunk > 1 && j == call.opening(j)) anchor.take(at);
            row.fill(space.c, j);
            inner_gradients<T, Activation>(o, norm, row.tokens(call.k, j), row.tokens(call.v, j), anchor, space.inner);
            if (surprises) surprise(o, space.inner, space.squares.at, row.gates(surprises, j));
            chunk_read<T, Activation>(
                o, norm, space.c, row.tokens(call.q, j), at, space.inner, space.read, row.tokens(y, j));
            chunk_update(o, space.c, space.inner, at, at, space.read.scaled);
        }
        given.take(at);
    });
}

template <class T>
struct BackwardSpace {
    State<T> adj, d_anchor;
    std::vector<State<T>> states;  // before each part
    std::vector<Inner<T>> inner;
    Coefficients<T> c;
    Read<T> read;
    Matrix<T> y;
    Backward<T> backward;

    BackwardSpace(Arena<T>& arena, const Options<T>& o, const Call& call)
        : adj(arena, o, o.momentum), d_anchor(call.per_chunk == 1 ? adj : State<T>(arena, o, false)),
          c(arena, call.tokens), read(arena, o, call.tokens), y(arena.matrix(call.tokens, o.sizes[0])),
          backward(arena, o, call.tokens) {
        for (int j = 0; j < call.parts; j++) {
            states.emplace_back(arena, o, o.momentum);
            inner.emplace_back(arena, o, call.tokens);
        }
    }
};

// What the backward fills, those of the tokens' tensors, and adds to; adj: of the state after the segment, which move
// to before it.
struct Gradients {
    Tensors adj;
    Tensor d_q, d_k, d_v, d_keep;
    Maybe d_eta;
    Tensor d_theta;
    Maybe d_gain, d_bias;
    Tensors d_document;
};

template <class T, class Activation>
void backward_rows(const Call& call, const Tensors& stored, const Tensor& d_y, const Gradients& g) {
    const Options<T> o = options<T>(call, stored);
    Arena<T> counted;
    BackwardSpace<T>(counted, o, call);
    by_rows<T>(call, o, counted.used, [&](const Row<T>& row, Arena<T> arena) {
        BackwardSpace<T> space(arena, o, call);
        const State<T> document = row.state(call.document), d_document = row.state(g.d_document);
        const State<T>&adj = space.adj, &d_anchor = space.d_anchor, given = row.state(g.adj);
        const Norm<T> norm = row.norm();
        adj.take(given);
        if (call.per_chunk > 1)
            for (const auto& w : d_anchor.w) std::fill(w.at, w.at + w.size(), T(0));
        for (int64_t j = 0; j < call.parts; j++) {
            const State<T>& at = space.states[j];
            if (row.starts(j)) at.take(document);
            else if (j == 0) at.take(row.state(stored));
            inner_gradients<T, Activation>(o, norm, row.tokens(call.k, j), row.tokens(call.v, j),
                                           space.states[call.opening(j)], space.inner[j]);
            if (j + 1 == call.parts) break;
            row.fill(space.c, j);
            chunk_update(o, space.c, space.inner[j], at, space.states[j + 1], space.read.scaled);
        }
        for (int64_t j = call.parts - 1; j >= 0; j--) {
            const State<T>&at = space.states[j], &anchor = space.states[call.opening(j)];
            row.fill(space.c, j);
            chunk_read<T, Activation>(
                o, norm, space.c, row.tokens(call.q, j), at, space.inner[j], space.read, space.y, true);
            chunk_backward<T, Activation>(
                o, norm, space.c, at, anchor, space.inner[j], space.read, adj, d_anchor, row.tokens(d_y, j),
                space.backward, row.tokens(g.d_q, j), row.tokens(g.d_k, j), row.tokens(g.d_v, j),
                row.vector(g.d_gain), row.vector(g.d_bias));
            space.backward.rows.pull(
                space.c, row.gates(call.keep, j), row.gates(call.eta, j), row.gates(g.d_keep, j),
                row.gates(g.d_eta, j), row.gates(g.d_theta, j));
            if (call.per_chunk > 1 && j == call.opening(j)) d_anchor.move_to(adj);
            if (row.starts(j)) adj.move_to(d_document);
        }
        given.take(adj);
    });
}

// Calls f with the number's type and the activation.
template <class F>
void chosen(const Call& call, F f) {
    const bool wide = call.q.scalar_type() == at::kDouble;
    if (wide && call.gelu) f(double(), Gelu<double>());
    if (wide && !call.gelu) f(double(), Silu<double>());
    if (!wide && call.gelu) f(float(), Gelu<float>());
    if (!wide && !call.gelu) f(float(), Silu<float>());
}

void forward(Tensor q, Tensor k, Tensor v, Tensor keep, Maybe eta, Tensor theta, Maybe starts, Tensors document,
             Maybe gain, Maybe bias, int64_t start, int64_t parts, int64_t tokens, int64_t per_chunk, bool gelu,
             double eps, Tensors state, Tensor y, Maybe surprises) {
    const Call call{q,    k,    v,     keep,  eta,    theta,     starts, document,
                    gain, bias, start, parts, tokens, per_chunk, gelu,   eps};
    call_fits(call, state);
    fits(y, q.sizes(), q, "y");
    fits(surprises, keep.sizes(), q, "surprises");
    chosen(call, [&](auto number, auto activation) {
        forward_rows<decltype(number), decltype(activation)>(call, state, y, surprises);
    });
}

void backward(Tensor q, Tensor k, Tensor v, Tensor keep, Maybe eta, Tensor theta, Maybe starts, Tensors document,
              Maybe gain, Maybe bias, int64_t start, int64_t parts, int64_t tokens, int64_t per_chunk, bool gelu,
              double eps, Tensors stored, Tensor d_y, Tensors adj, Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_keep,
              Maybe d_eta, Tensor d_theta, Maybe d_gain, Maybe d_bias, Tensors d_document) {
    const Call call{q,    k,    v,     keep,  eta,    theta,     starts, document,
                    gain, bias, start, parts, tokens, per_chunk, gelu,   eps};
    const Gradients g{adj, d_q, d_k, d_v, d_keep, d_eta, d_theta, d_gain, d_bias, d_document};
    call_fits(call, stored);
    state_fits(call, adj, stored, "the adjoint");
    if (starts) state_fits(call, d_document, stored, "the document state's gradient");
    for (const Tensor& x : {d_y, d_q, d_k, d_v}) fits(x, q.sizes(), q, "a gradient of tokens");
    for (const Maybe& x : {Maybe(d_keep), d_eta, Maybe(d_theta)}) fits(x, keep.sizes(), q, "a gradient of gates");
    for (const Maybe& x : {d_gain, d_bias}) fits(x, {q.size(0), 1, q.size(2)}, q, "a gradient of the norm");
    TORCH_CHECK(d_eta.has_value() == eta.has_value() && d_gain.has_value() == gain.has_value(),
                "there are gradients of what is there");
    chosen(call, [&](auto number, auto activation) {
        backward_rows<decltype(number), decltype(activation)>(call, stored, d_y, g);
    });
}

std::vector<int64_t> work() { return {products_made.load(), flops_made.load()}; }

}  // namespace titans

TORCH_LIBRARY(titans_train, m) {
    const std::string call =
        "(Tensor q, Tensor k, Tensor v, Tensor keep, Tensor? eta, Tensor theta, Tensor? starts, Tensor[] document, "
        "Tensor? gain, Tensor? bias, int start, int parts, int tokens, int per_chunk, bool gelu, float eps, ";
    m.def(("scan_forward" + call + "Tensor(a!)[] state, Tensor(b!) y, Tensor(c!)? surprises) -> ()").c_str());
    m.def(("scan_backward" + call +
           "Tensor[] stored, Tensor d_y, Tensor(a!)[] adj, Tensor(b!) d_q, Tensor(c!) d_k, Tensor(d!) d_v, "
           "Tensor(e!) d_keep, Tensor(f!)? d_eta, Tensor(g!) d_theta, Tensor(h!)? d_gain, Tensor(i!)? d_bias, "
           "Tensor(j!)[] d_document) -> ()")
              .c_str());
    m.def("scan_work() -> int[]", titans::work);  // products, and their FLOPs, so far
}

TORCH_LIBRARY_IMPL(titans_train, CPU, m) {
    m.impl("scan_forward", titans::forward);
    m.impl("scan_backward", titans::backward);
}
