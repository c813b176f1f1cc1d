// The bodies of a site on a CPU: what cpu.py calls. One library for each number of streams and dtype of them.
//
// g++ and clang++ compile this in about a second: no header of torch is included, and sizes and conventions are
// arguments. STREAMS and ELEMENT are given on the command line. What is per token goes through the coefficients with a
// token in each lane of a vector, so that Sinkhorn's iterations stay in registers; what has features is a loop over
// them. Every sum has an order that depends on no number of threads.

#include <cstdint>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int N = STREAMS;
constexpr int LANES = 16;   // tokens of a block
constexpr int CHUNK = 64;   // tokens whose gradients of alpha and bias are one share of the sum
constexpr int COLUMNS = 2 * N + N * N;

typedef float Lane __attribute__((vector_size(4 * LANES)));
typedef int32_t Bits __attribute__((vector_size(4 * LANES)));

// --- elements of streams, in memory and in arithmetic ---------------------------------------------------------

struct Bfloat16 {
  uint16_t bits;
};

inline Lane widened(const float *x) {
  Lane made;
  std::memcpy(&made, x, sizeof made);
  return made;
}

inline Lane widened(const Bfloat16 *x) {
  typedef uint16_t Narrow __attribute__((vector_size(2 * LANES)));
  Narrow bits;
  std::memcpy(&bits, x, sizeof bits);
  Bits wide = __builtin_convertvector(bits, Bits) << 16;
  Lane made;
  std::memcpy(&made, &wide, sizeof made);
  return made;
}

inline void narrow(Lane x, float *out) { std::memcpy(out, &x, sizeof x); }

inline void narrow(Lane x, Bfloat16 *out) {  // to the nearest, ties to even
  typedef uint16_t Narrow __attribute__((vector_size(2 * LANES)));
  typedef uint32_t Wide __attribute__((vector_size(4 * LANES)));
  Wide bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  bits = x != x ? Wide{} + 0x7fc0 : bits;
  Narrow made = __builtin_convertvector(bits, Narrow);
  std::memcpy(out, &made, sizeof made);
}

#ifdef HALF  // not every compiler has it
typedef _Float16 Half;

inline Lane widened(const Half *x) {
  Lane made;
  for (int l = 0; l < LANES; ++l) made[l] = float(x[l]);
  return made;
}

inline void narrow(Lane x, Half *out) {
  for (int l = 0; l < LANES; ++l) out[l] = Half(x[l]);
}
#endif

typedef ELEMENT Element;

inline float number(float x) { return x; }

inline float number(Bfloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float made;
  std::memcpy(&made, &bits, sizeof made);
  return made;
}

#ifdef HALF
inline float number(Half x) { return float(x); }
#endif

// The first `count` of LANES elements; the others are 0.
template <class T>
inline Lane load(const T *x, int count) {
  if (count == LANES) return widened(x);
  T part[LANES] = {};
  std::memcpy((void *)part, x, sizeof(T) * count);
  return widened(part);
}

template <class T>
inline void store(Lane x, T *out, int count) {
  if (count == LANES) return narrow(x, out);
  T part[LANES];
  narrow(x, part);
  std::memcpy((void *)out, part, sizeof(T) * count);
}

// Calls visit(k, count) for all features, LANES at a time.
template <class Visit>
inline void over(int64_t features, Visit visit) {
  int64_t k = 0;
  for (; k + LANES <= features; k += LANES) visit(k, LANES);
  if (k < features) visit(k, int(features - k));
}

inline float total(Lane x) {
  float part[LANES];
  std::memcpy(part, &x, sizeof part);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) part[l] += part[l + width];
  return part[0];
}

// `count` weights as they multiply streams: rounded to their dtype or not.
inline void weights_of(const float *given, int step, int count, int rounds, float *weights) {
  for (int i = 0; i < count; ++i) {
    weights[i] = given[i * step];
    if (rounds) {
      Element part[LANES];
      narrow(Lane{} + weights[i], part);
      weights[i] = widened(part)[0];
    }
  }
}

// --- a convention (kernels/convention.py), as far as it changes what is computed here --------------------------

struct Convention {
  float rms_eps, pre_eps, post_scale, post_eps, divisor_eps;
  int32_t groups, iterations, rows_first;

  int columns() const { return groups == 3 ? COLUMNS : groups * N; }
  // Sinkhorn here begins with sums over the first axis: with rows first the matrices are turned.
  int place(int i, int j) const { return 2 * N + (rows_first ? j * N + i : i * N + j); }
};

// --- functions of lanes ------------------------------------------------------------------------------------------

// e^x for x <= 0, to 2 ulp; what float32 has no normal number for is 0.
inline Lane exponential(Lane x) {
  const Lane shift = Lane{} + 12582912.f;  // 1.5 * 2^23: its ulp is 1
  Lane k = x * 1.44269504f + shift;
  k -= shift;
  Lane r = x - k * 0.693359375f + k * 2.12194440e-4f;
  Lane p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  Bits power = (__builtin_convertvector(x < -87.3f ? Lane{} : k, Bits) + 127) << 23;
  Lane scale;
  std::memcpy(&scale, &power, sizeof scale);
  return x < -87.3f ? Lane{} : p * scale;
}

inline Lane sigmoid(Lane x) {
  Lane e = exponential(x > 0.f ? -x : x);
  return (x > 0.f ? Lane{} + 1.f : e) / (e + 1.f);
}

inline Lane larger(Lane a, Lane b) { return a > b ? a : b; }

// One half-step: divide by the sums over the first axis (or the second) + e.
template <bool FIRST>
inline void divide(Lane m[N][N], float e) {
  for (int a = 0; a < N; ++a) {
    Lane sum = FIRST ? m[0][a] : m[a][0];
    for (int b = 1; b < N; ++b) sum += FIRST ? m[b][a] : m[a][b];
    Lane inverse = 1.f / (sum + e);
    for (int b = 0; b < N; ++b) (FIRST ? m[b][a] : m[a][b]) *= inverse;
  }
}

// Logits -> the matrix behind all iterations; with KEEP, `steps` gets the one behind each half-step.
template <bool KEEP>
inline void sinkhorn(Lane m[N][N], const Convention &c, Lane *steps) {
  const size_t size = sizeof(Lane) * N * N;
  Lane sums[N];
  for (int j = 0; j < N; ++j) {
    Lane top = m[0][j];
    for (int i = 1; i < N; ++i) top = larger(top, m[i][j]);
    sums[j] = Lane{};
    for (int i = 0; i < N; ++i) {
      m[i][j] -= top;
      sums[j] += exponential(m[i][j]);
    }
  }
  Lane softmax[N][N];
  if (KEEP || c.divisor_eps != 0)
    for (int i = 0; i < N; ++i)
      for (int j = 0; j < N; ++j) softmax[i][j] = exponential(m[i][j]) / sums[j] + c.divisor_eps;
  if (KEEP) std::memcpy((void *)steps, softmax, size);
  if (c.divisor_eps != 0) {
    std::memcpy((void *)m, softmax, size);
    divide<false>(m, c.divisor_eps);
  } else {
    // From the logits again, as an entire row of the softmax may be 0: its largest is made 1 / its column's sum.
    for (int i = 0; i < N; ++i) {
      Lane top = m[i][0];
      for (int j = 1; j < N; ++j) top = larger(top, m[i][j]);
      for (int j = 0; j < N; ++j) m[i][j] = exponential(m[i][j] - top) / sums[j];
    }
    divide<false>(m, 0);
  }
  if (KEEP) std::memcpy((void *)(steps + N * N), m, size);
  for (int k = 1; k < c.iterations; ++k) {
    divide<true>(m, c.divisor_eps);
    if (KEEP) std::memcpy((void *)(steps + 2 * k * N * N), m, size);
    divide<false>(m, c.divisor_eps);
    if (KEEP) std::memcpy((void *)(steps + (2 * k + 1) * N * N), m, size);
  }
}

// g -= step * sum(g) over the first axis, or the second.
template <bool FIRST>
inline void centre(Lane g[N][N], const Lane *step) {
  for (int a = 0; a < N; ++a) {
    Lane sum = FIRST ? g[0][a] : g[a][0];
    for (int b = 1; b < N; ++b) sum += FIRST ? g[b][a] : g[a][b];
    for (int b = 0; b < N; ++b) {
      int i = FIRST ? b : a, j = FIRST ? a : b;
      g[i][j] -= step[i * N + j] * sum;
    }
  }
}

// The gradient of the matrix -> that of its logits.
inline void sinkhorn_backward(Lane g[N][N], const Convention &c, const Lane *steps) {
  const Lane *last = steps + (2 * c.iterations - 1) * N * N;
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j) g[i][j] *= last[i * N + j];
  for (int k = c.iterations - 1; k > 0; --k) {
    centre<false>(g, steps + (2 * k + 1) * N * N);
    centre<true>(g, steps + 2 * k * N * N);
  }
  centre<false>(g, steps + N * N);
  Lane softmax[N * N];
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j) {
      Lane first = steps[i * N + j];
      softmax[i * N + j] = first - c.divisor_eps;
      if (c.divisor_eps != 0) g[i][j] *= softmax[i * N + j] / first;
    }
  centre<true>(g, softmax);
}

// --- tokens to lanes and back ------------------------------------------------------------------------------------

// rows [count, width] -> lanes[width]; lanes beyond count are `fill`.
inline void to_lanes(const float *rows, int count, int width, Lane *lanes, float fill = 0) {
  for (int k = 0; k < width; ++k) {
    Lane x = Lane{} + fill;
    for (int l = 0; l < count; ++l) x[l] = rows[l * width + k];
    lanes[k] = x;
  }
}

inline void from_lanes(const Lane *lanes, int count, int width, float *rows) {
  for (int l = 0; l < count; ++l)
    for (int k = 0; k < width; ++k) rows[l * width + k] = lanes[k][l];
}

// [width, tokens], of which `count` begin here: tokens are contiguous.
inline void from_columns(const float *columns, int64_t tokens, int count, int width, Lane *lanes) {
  for (int k = 0; k < width; ++k) {
    lanes[k] = Lane{};
    std::memcpy((void *)(lanes + k), columns + k * tokens, sizeof(float) * count);
  }
}

inline void to_columns(const Lane *lanes, int64_t tokens, int count, int width, float *columns) {
  for (int k = 0; k < width; ++k) std::memcpy(columns + k * tokens, lanes + k, sizeof(float) * count);
}

inline int group_of(int column) { return column < N ? 0 : column < 2 * N ? 1 : 2; }

inline void logits(const Lane *z, Lane r, const float *alpha, const float *bias, int columns, Lane *a) {
  Lane inverse = 1.f / r;
  for (int k = 0; k < columns; ++k) a[k] = z[k] * inverse * alpha[group_of(k)] + bias[k];
}

inline int block_of(int64_t t, int64_t tokens) { return tokens - t < LANES ? int(tokens - t) : LANES; }

inline Lane square_root(Lane x) {
  for (int l = 0; l < LANES; ++l) x[l] = __builtin_sqrtf(x[l]);
  return x;
}

// --- products of matrices, where a call of torch.mm would take longer than the product ---------------------------

// out [rows, width] = left [rows, depth] right [depth, width]; the strides of left are given.
template <class T>
void product(const T *left, int64_t row, int64_t step, const float *right, float *out, int64_t rows, int64_t depth,
             int64_t width) {
  constexpr int AT_ONCE = 8;
  for (int64_t first = 0; first < rows; first += AT_ONCE) {
    const int some = rows - first < AT_ONCE ? int(rows - first) : AT_ONCE;
    for (int64_t b = 0; b < width; b += LANES) {
      const int part = width < LANES ? int(width) : LANES;
      const int64_t start = width - b < part ? width - part : b;  // the last ones are computed twice: no part of a load
      Lane sums[AT_ONCE] = {};
      for (int64_t k = 0; k < depth; ++k) {
        const Lane one = load(right + k * width + start, part);
        const T *column = left + first * row + k * step;
        if (some == AT_ONCE)
          for (int a = 0; a < AT_ONCE; ++a) sums[a] += number(column[a * row]) * one;
        else
          for (int a = 0; a < some; ++a) sums[a] += number(column[a * row]) * one;
      }
      for (int a = 0; a < some; ++a) store(sums[a], out + (first + a) * width + start, part);
    }
  }
}

}  // namespace

// x [T, n, C], z = vec(x) phi [T, columns] -> u [T, C]; pre, post [T, n]; res [T, n, n]; z turned [columns, T]; r [T]
// z null: it is computed here; u null: not wanted.
EXPORT void mhc_read(const Element *x, const float *phi, const float *z, const float *alpha, const float *bias, Element *u, float *pre,
                     float *post, float *res, float *z_turned, float *r, const Convention *convention, int64_t tokens,
                     int64_t features, int threads) {
  const Convention c = *convention;
  const int columns = c.columns();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < tokens; t += LANES) {
    const int count = block_of(t, tokens);
    Lane mean = Lane{};
    for (int l = 0; l < count; ++l) {
      const Element *own = x + (t + l) * N * features;
      Lane squares[4] = {};
      over(N * features, [&](int64_t k, int part) {
        Lane one = load(own + k, part);
        squares[k / LANES % 4] += one * one;
      });
      mean[l] = total(squares[0] + squares[1] + (squares[2] + squares[3])) / float(N * features);
    }
    Lane zs[COLUMNS], a[COLUMNS], made[COLUMNS], rs = square_root(mean + c.rms_eps);
    if (z) {
      to_lanes(z + t * columns, count, columns, zs);
    } else {
      float made[LANES * COLUMNS];
      product(x + t * N * features, N * features, 1, phi, made, count, N * features, columns);
      to_lanes(made, count, columns, zs);
    }
    logits(zs, count < LANES ? (rs > 0.f ? rs : Lane{} + 1.f) : rs, alpha, bias, columns, a);
    to_columns(zs, tokens, count, columns, z_turned + t);
    to_columns(&rs, tokens, count, 1, r + t);
    for (int i = 0; i < N; ++i) made[i] = sigmoid(a[i]) + c.pre_eps;
    from_lanes(made, count, N, pre + t * N);
    if (c.groups > 1) {
      for (int i = 0; i < N; ++i) made[N + i] = sigmoid(a[N + i]) * c.post_scale + c.post_eps;
      from_lanes(made + N, count, N, post + t * N);
    }
    if (c.groups > 2) {
      Lane m[N][N];
      for (int i = 0; i < N; ++i)
        for (int j = 0; j < N; ++j) m[i][j] = a[c.place(i, j)];
      sinkhorn<false>(m, c, nullptr);
      for (int i = 0; i < N; ++i)
        for (int j = 0; j < N; ++j) made[c.place(i, j)] = m[i][j];
      from_lanes(made + 2 * N, count, N * N, res + t * N * N);
    }
    for (int l = 0; u && l < count; ++l) {
      const Element *own = x + (t + l) * N * features;
      const float *gain = pre + (t + l) * N;
      Element *out = u + (t + l) * features;
      over(features, [&](int64_t k, int part) {
        Lane sum = gain[0] * load(own + k, part);
        for (int i = 1; i < N; ++i) sum += gain[i] * load(own + i * features + k, part);
        store(sum, out + k, part);
      });
    }
  }
}

// What reaches the coefficients (each may be null) -> dz [T, columns], pull [T] (what X is drawn by), dalpha, dbias.
// `shares` is room for two sums of columns for each chunk, `steps` for the half-steps of each thread.
EXPORT void mhc_read_backward(const Element *du, const float *dpre, const float *dpost, const float *dres,
                              const Element *x, const float *z_turned, const float *r, const float *alpha,
                              const float *bias, float *dz, float *pull, float *dalpha, float *dbias, float *shares,
                              const Convention *convention, int64_t tokens, int64_t features, int threads) {
  const Convention c = *convention;
  const int columns = c.columns();
  const int64_t chunks = (tokens + CHUNK - 1) / CHUNK;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Lane *steps = nullptr;
    char *room = nullptr;
    if (c.groups > 2) {
      room = new char[sizeof(Lane) * (2 * c.iterations * N * N + 1)];
      steps = (Lane *)(((uintptr_t)room + sizeof(Lane) - 1) / sizeof(Lane) * sizeof(Lane));
    }
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      Lane of_scale[COLUMNS] = {}, of_bias[COLUMNS] = {};
      const int64_t end = (chunk + 1) * CHUNK < tokens ? (chunk + 1) * CHUNK : tokens;
      for (int64_t t = chunk * CHUNK; t < end; t += LANES) {
        const int count = block_of(t, tokens);
        Lane zs[COLUMNS], a[COLUMNS], d[COLUMNS] = {}, rs = Lane{} + 1.f;
        from_columns(z_turned + t, tokens, count, columns, zs);
        for (int l = 0; l < count; ++l) rs[l] = r[t + l];
        logits(zs, rs, alpha, bias, columns, a);
        if (dpre) to_lanes(dpre + t * N, count, N, d);
        if (dpost) to_lanes(dpost + t * N, count, N, d + N);
        if (du)
          for (int l = 0; l < count; ++l) {
            const Element *own = x + (t + l) * N * features, *grad = du + (t + l) * features;
            Lane sums[N] = {};
            over(features, [&](int64_t k, int part) {
              Lane one = load(grad + k, part);
              for (int i = 0; i < N; ++i) sums[i] += load(own + i * features + k, part) * one;
            });
            for (int i = 0; i < N; ++i) d[i][l] += total(sums[i]);
          }
        for (int k = 0; k < N * (c.groups > 1 ? 2 : 1); ++k) {
          Lane open = sigmoid(a[k]);
          d[k] *= open * (1.f - open) * (k < N ? 1.f : c.post_scale);
        }
        if (c.groups > 2 && dres) {
          Lane given[N * N], m[N][N], g[N][N];
          to_lanes(dres + t * N * N, count, N * N, given);
          for (int i = 0; i < N; ++i)
            for (int j = 0; j < N; ++j) {
              m[i][j] = a[c.place(i, j)];
              g[i][j] = given[c.place(i, j) - 2 * N];
            }
          sinkhorn<true>(m, c, steps);
          sinkhorn_backward(g, c, steps);
          for (int i = 0; i < N; ++i)
            for (int j = 0; j < N; ++j) d[c.place(i, j)] = g[i][j];
        }
        Lane inverse = 1.f / rs, along = Lane{};
        for (int k = 0; k < columns; ++k) {
          Lane over = d[k] * inverse;
          of_bias[k] += d[k];
          of_scale[k] += over * zs[k];
          d[k] = over * alpha[group_of(k)];
          along += d[k] * zs[k];
        }
        along *= inverse * inverse / float(N * features);
        from_lanes(d, count, columns, dz + t * columns);
        to_columns(&along, tokens, count, 1, pull + t);
      }
      for (int k = 0; k < columns; ++k) {
        float scale = 0, shift = 0;
        for (int l = 0; l < LANES; ++l) {
          scale += of_scale[k][l];
          shift += of_bias[k][l];
        }
        shares[(2 * chunk) * columns + k] = scale;
        shares[(2 * chunk + 1) * columns + k] = shift;
      }
    }
    delete[] room;
  }
  for (int g = 0; g < c.groups; ++g) dalpha[g] = 0;
  for (int k = 0; k < columns; ++k) {
    double scale = 0, shift = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      scale += shares[(2 * chunk) * columns + k];
      shift += shares[(2 * chunk + 1) * columns + k];
    }
    dalpha[group_of(k)] += float(scale);
    dbias[k] = float(shift);
  }
}

// dx = wide - x pull + pre du + sum_i res_ij G_i for `tokens` tokens; wide = dz phi^T may be dx itself.
// du and grad may be null; res null is the identity.
EXPORT void mhc_streams(Element *dx, const float *wide, const Element *x, const Element *du, const Element *grad,
                        const float *pre, const float *res, const float *pull, int transposed, int rounds,
                        int64_t tokens, int64_t features, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t start = t * N * features;
    const Element *own = x + start, *g = grad ? grad + start : nullptr, *d = du ? du + t * features : nullptr;
    float weights[N][N];  // of G_i in dX_j
    for (int j = 0; res && j < N; ++j)
      weights_of(res + t * N * N + (transposed ? j * N : j), transposed ? 1 : N, N, rounds, weights[j]);
    over(features, [&](int64_t k, int part) {
      Lane gs[N], one = d ? load(d + k, part) : Lane{};
      for (int i = 0; i < N; ++i) gs[i] = g ? load(g + i * features + k, part) : Lane{};
      for (int j = 0; j < N; ++j) {
        const int64_t place = j * features + k;
        Lane sum = load(wide + start + place, part) - pull[t] * load(own + place, part) + pre[t * N + j] * one;
        if (!res)
          sum += gs[j];
        else
          for (int i = 0; i < N; ++i) sum += weights[j][i] * gs[i];
        store(sum, dx + start + place, part);
      }
    });
  }
}

// For few tokens, all of it: dphi [n C, columns] = vec(x)^T dz too and, unless null, dx.
EXPORT void mhc_read_backward_few(const Element *du, const float *dpre, const float *dpost, const float *dres,
                                  const Element *grad, const Element *x, const float *phi, const float *z_turned,
                                  const float *r, const float *alpha, const float *bias, const float *pre,
                                  const float *res, Element *dx, float *dphi, float *dalpha, float *dbias,
                                  const Convention *convention, int transposed, int rounds, int64_t tokens,
                                  int64_t features, int threads) {
  const int columns = convention->columns();
  const int64_t width = N * features, shares = 2 * columns * ((tokens + CHUNK - 1) / CHUNK);
  float *room = new float[shares + tokens * (columns + 1) + width * (columns + tokens)];
  float *dz = room + shares, *pull = dz + tokens * columns, *turned = pull + tokens, *wide = turned + width * columns;
  mhc_read_backward(du, dpre, dpost, dres, x, z_turned, r, alpha, bias, dz, pull, dalpha, dbias, room, convention,
                    tokens, features, threads);
  product(x, 1, width, dz, dphi, width, tokens, columns);
  if (dx) {
    for (int64_t k = 0; k < width; ++k)
      for (int c = 0; c < columns; ++c) turned[c * width + k] = phi[k * columns + c];
    product(dz, columns, 1, turned, wide, tokens, columns, width);
    mhc_streams(dx, wide, x, du, grad, pre, res, pull, transposed, rounds, tokens, features, threads);
  }
  delete[] room;
}

// x [T, n, C], f [T, C], post [T, n], res [T, n, n] or null -> out [T, n, C]
EXPORT void mhc_merge(const Element *x, const Element *f, const float *post, const float *res, Element *out,
                      int transposed, int rounds, int64_t tokens, int64_t features, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < tokens; ++t) {
    const Element *own = x + t * N * features, *branch = f + t * features;
    Element *merged = out + t * N * features;
    float gains[N], weights[N][N];
    weights_of(post + t * N, 1, N, rounds, gains);
    for (int i = 0; res && i < N; ++i)
      weights_of(res + t * N * N + (transposed ? i : i * N), transposed ? N : 1, N, rounds, weights[i]);
    over(features, [&](int64_t k, int part) {
      Lane xs[N], one = load(branch + k, part);
      for (int j = 0; j < N; ++j) xs[j] = load(own + j * features + k, part);
      for (int i = 0; i < N; ++i) {
        Lane sum = gains[i] * one;
        if (!res)
          sum += xs[i];
        else
          for (int j = 0; j < N; ++j) sum += weights[i][j] * xs[j];
        store(sum, merged + i * features + k, part);
      }
    });
  }
}

// G, x [T, n, C], f [T, C], post [T, n] -> df [T, C]; dpost [T, n], dres [T, n, n] (null: not wanted)
EXPORT void mhc_branch_backward(const Element *grad, const Element *x, const Element *f, const float *post, Element *df,
                                float *dpost, float *dres, int transposed, int rounds, int64_t tokens,
                                int64_t features, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < tokens; ++t) {
    const Element *g = grad + t * N * features, *own = x + t * N * features, *branch = f + t * features;
    Element *out = df + t * features;
    float gains[N];
    weights_of(post + t * N, 1, N, rounds, gains);
    over(features, [&](int64_t k, int part) {
      Lane sum = gains[0] * load(g + k, part);
      for (int i = 1; i < N; ++i) sum += gains[i] * load(g + i * features + k, part);
      store(sum, out + k, part);
    });
    for (int i = 0; i < N; ++i) {
      Lane sums[N] = {}, of_f = Lane{};
      over(features, [&](int64_t k, int part) {
        Lane row = load(g + i * features + k, part);
        of_f += row * load(branch + k, part);
        if (dres)
          for (int j = 0; j < N; ++j) sums[j] += row * load(own + j * features + k, part);
      });
      dpost[t * N + i] = total(of_f);
      for (int j = 0; dres && j < N; ++j)
        dres[t * N * N + (transposed ? j * N + i : i * N + j)] = total(sums[j]);
    }
  }
}
