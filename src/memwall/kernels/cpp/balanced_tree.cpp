#include "balanced_tree.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "threads.h"

namespace mw {
namespace {

constexpr int kMostRounds = 100, kPatience = 5, kStarts = 3;

// k-means of one node's sample, with a penalty on the sizes of clusters.
class Clusters {
 public:
  Clusters(const VectorRows& rows, const TreeSettings& settings) : rows_(rows), settings_(settings), width_(rows.padded()) {}

  // Learns centers from the vectors `ids`, which it shuffles; then gives each the nearest of the vectors that stand for the centers.
  void split(std::int32_t* ids, std::int64_t count, double factor, std::uint64_t seed) {
    learn(ids, count, factor, seed);
    choose_medoids(ids, count);
  }
  void learn(std::int32_t* ids, std::int64_t count, double factor, std::uint64_t seed) {
    Draws draws(seed);
    sampled_ = std::min(count, settings_.samples);
    for (std::int64_t i = 0; i < sampled_; ++i) std::swap(ids[i], ids[i + draws.below(count - i)]);
    sample_.resize(static_cast<std::size_t>(sampled_ * width_));
    for (std::int64_t i = 0; i < sampled_; ++i) decode_vector(rows_, ids[i], sample_.data() + i * width_);
    k_ = static_cast<int>(std::min<std::int64_t>(settings_.children, count));
    std::vector<float> start;
    double least = std::numeric_limits<double>::infinity(), most_penalty = 0;
    for (int attempt = 0; attempt < kStarts; ++attempt) {
      draw_centers(draws);
      counts_.assign(static_cast<std::size_t>(k_), 0);
      assign(0);
      const double total = std::accumulate(apart_.begin(), apart_.end(), 0.0);
      if (total < least) {
        least = total;
        start = centers_;
        most_penalty = spread_of_biggest();
      }
    }
    centers_ = start;
    const double wanted = settings_.range * settings_.range / factor / static_cast<double>(sampled_);
    lambda_ = std::isinf(factor) ? 0 : std::min(wanted, most_penalty);
    refine();
  }
  // Standard deviation of the sizes over their mean.
  double unevenness() const {
    const double mean = static_cast<double>(sampled_) / k_;
    double squares = 0;
    for (const std::int64_t count : counts_) squares += (count - mean) * (count - mean);
    return std::sqrt(squares / k_) / mean;
  }
  const std::vector<std::int32_t>& labels() const { return labels_; }
  const std::vector<std::int32_t>& medoids() const { return medoids_; }  // places among the ids, -1 of an empty one

 private:
  VectorRows center_rows() const {
    return {reinterpret_cast<const std::uint8_t*>(centers_.data()), static_cast<std::int64_t>(width_ * sizeof(float)), k_, rows_.size, Element::float32};
  }
  void draw_centers(Draws& draws) {
    std::vector<std::int64_t> places(static_cast<std::size_t>(sampled_));
    std::iota(places.begin(), places.end(), 0);
    centers_.resize(static_cast<std::size_t>(k_) * static_cast<std::size_t>(width_));
    for (int c = 0; c < k_; ++c) {
      std::swap(places[static_cast<std::size_t>(c)], places[static_cast<std::size_t>(c + draws.below(sampled_ - c))]);
      std::copy_n(sample_.data() + places[static_cast<std::size_t>(c)] * width_, width_, centers_.data() + static_cast<std::int64_t>(c) * width_);
    }
  }
  // Labels the sample: the least of distance and penalty, by the sizes of the round before. Sizes and distances are new afterwards.
  void assign(double lambda) {
    labels_.resize(static_cast<std::size_t>(sampled_));
    apart_.resize(static_cast<std::size_t>(sampled_));
    std::vector<std::int64_t> sizes(static_cast<std::size_t>(k_), 0);
    std::vector<float> distance(static_cast<std::size_t>(k_));
    for (std::int64_t i = 0; i < sampled_; ++i) {
      squared_distances(center_rows(), sample_.data() + i * width_, nullptr, k_, distance.data());
      int best = 0;
      double least = std::numeric_limits<double>::infinity();
      for (int c = 0; c < k_; ++c) {
        const double cost = distance[static_cast<std::size_t>(c)] + lambda * static_cast<double>(counts_[static_cast<std::size_t>(c)]);
        if (cost < least) {
          least = cost;
          best = c;
        }
      }
      labels_[static_cast<std::size_t>(i)] = best;
      apart_[static_cast<std::size_t>(i)] = distance[static_cast<std::size_t>(best)];
      ++sizes[static_cast<std::size_t>(best)];
    }
    counts_ = sizes;
  }
  int biggest() const { return static_cast<int>(std::max_element(counts_.begin(), counts_.end()) - counts_.begin()); }
  // The most that a penalty may be: the biggest cluster's largest distance less its mean, for each vector of the sample.
  double spread_of_biggest() const {
    const int big = biggest();
    double most = 0, sum = 0;
    for (std::int64_t i = 0; i < sampled_; ++i)
      if (labels_[static_cast<std::size_t>(i)] == big) {
        most = std::max(most, static_cast<double>(apart_[static_cast<std::size_t>(i)]));
        sum += apart_[static_cast<std::size_t>(i)];
      }
    const double mean = sum / static_cast<double>(std::max<std::int64_t>(counts_[static_cast<std::size_t>(big)], 1));
    return std::max(0.0, most - mean) / static_cast<double>(sampled_);
  }
  double objective() const {
    double sum = std::accumulate(apart_.begin(), apart_.end(), 0.0);
    const double mean = static_cast<double>(sampled_) / k_;
    for (const std::int64_t count : counts_) sum += lambda_ * (count - mean) * (count - mean);
    return sum;
  }
  void move_centers() {
    std::vector<double> sums(centers_.size(), 0);
    for (std::int64_t i = 0; i < sampled_; ++i) {
      const float* x = sample_.data() + i * width_;
      double* sum = sums.data() + static_cast<std::int64_t>(labels_[static_cast<std::size_t>(i)]) * width_;
      for (int d = 0; d < rows_.size; ++d) sum[d] += x[d];
    }
    std::vector<char> given(static_cast<std::size_t>(sampled_), 0);
    for (int c = 0; c < k_; ++c) {
      float* center = centers_.data() + static_cast<std::int64_t>(c) * width_;
      const std::int64_t count = counts_[static_cast<std::size_t>(c)];
      if (count) {
        for (int d = 0; d < rows_.size; ++d) center[d] = static_cast<float>(sums[static_cast<std::size_t>(static_cast<std::int64_t>(c) * width_ + d)] / static_cast<double>(count));
        continue;
      }
      const int big = biggest();  // an empty cluster begins anew at the farthest member of the biggest
      std::int64_t far = -1;
      for (std::int64_t i = 0; i < sampled_; ++i)
        if (labels_[static_cast<std::size_t>(i)] == big && !given[static_cast<std::size_t>(i)] &&
            (far < 0 || apart_[static_cast<std::size_t>(i)] > apart_[static_cast<std::size_t>(far)]))
          far = i;
      if (far < 0) continue;
      given[static_cast<std::size_t>(far)] = 1;
      std::copy_n(sample_.data() + far * width_, width_, center);
    }
  }
  void refine() {
    std::vector<float> best = centers_;
    std::vector<std::int64_t> sizes = counts_;
    double least = std::numeric_limits<double>::infinity();
    counts_.assign(static_cast<std::size_t>(k_), 0);
    for (int round = 0, idle = 0; round < kMostRounds && idle < kPatience; ++round) {
      const std::vector<float> used = centers_;
      assign(lambda_);
      const double now = objective();
      if (now < least) {
        least = now;
        best = used;
        sizes = counts_;
        idle = 0;
      } else {
        ++idle;
      }
      move_centers();
    }
    centers_ = best;
    counts_ = sizes;
  }
  void label_all(const std::int32_t* ids, std::int64_t count) {
    labels_.resize(static_cast<std::size_t>(count));
    apart_.resize(static_cast<std::size_t>(count));
    std::vector<float> query(static_cast<std::size_t>(width_)), distance(static_cast<std::size_t>(k_));
    for (std::int64_t i = 0; i < count; ++i) {
      decode_vector(rows_, ids[i], query.data());
      squared_distances(center_rows(), query.data(), nullptr, k_, distance.data());
      const auto best = std::min_element(distance.begin(), distance.end()) - distance.begin();
      labels_[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(best);
      apart_[static_cast<std::size_t>(i)] = distance[static_cast<std::size_t>(best)];
    }
  }
  void choose_medoids(const std::int32_t* ids, std::int64_t count) {
    label_all(ids, count);
    medoids_.assign(static_cast<std::size_t>(k_), -1);
    for (std::int64_t i = 0; i < count; ++i) {
      std::int32_t& medoid = medoids_[static_cast<std::size_t>(labels_[static_cast<std::size_t>(i)])];
      if (medoid < 0 || apart_[static_cast<std::size_t>(i)] < apart_[static_cast<std::size_t>(medoid)]) medoid = static_cast<std::int32_t>(i);
    }
    int kept = 0;  // clusters that nothing is nearest to are no clusters any more
    for (int c = 0; c < k_; ++c)
      if (medoids_[static_cast<std::size_t>(c)] >= 0) medoids_[static_cast<std::size_t>(kept++)] = medoids_[static_cast<std::size_t>(c)];
    k_ = kept;
    medoids_.resize(static_cast<std::size_t>(k_));
    for (int c = 0; c < k_; ++c) decode_vector(rows_, ids[medoids_[static_cast<std::size_t>(c)]], centers_.data() + static_cast<std::int64_t>(c) * width_);
    label_all(ids, count);
    for (int c = 0; c < k_; ++c) labels_[static_cast<std::size_t>(medoids_[static_cast<std::size_t>(c)])] = c;  // of equal vectors too
  }

  const VectorRows& rows_;
  const TreeSettings& settings_;
  const std::int64_t width_;
  std::int64_t sampled_ = 0;
  int k_ = 0;
  double lambda_ = 0;
  std::vector<float> sample_, centers_, apart_;
  std::vector<std::int64_t> counts_;
  std::vector<std::int32_t> labels_, medoids_;
};

struct Part {
  std::int32_t node;
  std::int64_t begin, end;  // of the ids
};

double best_factor(const VectorRows& rows, const TreeSettings& settings, std::vector<std::int32_t> ids) {
  double best = 1, least = std::numeric_limits<double>::infinity();
  for (int power = -3; power <= 3; ++power) {
    Clusters clusters(rows, settings);
    clusters.learn(ids.data(), static_cast<std::int64_t>(ids.size()), std::pow(10.0, power), settings.seed);
    const double uneven = clusters.unevenness();
    if (uneven < least) {
      least = uneven;
      best = std::pow(10.0, power);
    }
  }
  return best;
}

}  // namespace

BalancedTree balanced_tree(const VectorRows& rows, const TreeSettings& settings) {
  BalancedTree tree;
  std::vector<std::int32_t> ids(static_cast<std::size_t>(rows.count));
  std::iota(ids.begin(), ids.end(), 0);
  tree.points = {-1};
  tree.begins = tree.ends = {0};
  tree.factor = settings.factor < 0 ? best_factor(rows, settings, ids) : settings.factor;
  std::vector<Part> level = {{0, 0, rows.count}};
  while (!level.empty()) {
    struct Found {
      std::vector<std::int32_t> medoids;
      std::vector<std::int64_t> ends;  // within the part, medoids left out
    };
    std::vector<Found> found(level.size());
    parallel_for(level.size(), 1, [&](std::size_t first, std::size_t last, int) {
      Clusters clusters(rows, settings);
      for (std::size_t p = first; p < last; ++p) {
        const Part part = level[p];
        const std::int64_t count = part.end - part.begin;
        if (count <= settings.leaf) continue;
        std::int32_t* mine = ids.data() + part.begin;
        clusters.split(mine, count, tree.factor, settings.seed ^ (static_cast<std::uint64_t>(part.node) + 1) * 0x9e3779b97f4a7c15u);
        const auto& medoids = clusters.medoids();
        if (medoids.size() < 2) continue;  // equal vectors: all of them become leaves
        std::vector<std::vector<std::int32_t>> groups(medoids.size());
        std::vector<char> is_medoid(static_cast<std::size_t>(count), 0);
        for (const std::int32_t at : medoids) is_medoid[static_cast<std::size_t>(at)] = 1;
        for (std::int64_t i = 0; i < count; ++i)
          if (!is_medoid[static_cast<std::size_t>(i)]) groups[static_cast<std::size_t>(clusters.labels()[static_cast<std::size_t>(i)])].push_back(mine[i]);
        for (const std::int32_t at : medoids) found[p].medoids.push_back(mine[at]);
        std::int64_t at = 0;
        for (const auto& group : groups) {
          std::copy(group.begin(), group.end(), mine + at);
          at += static_cast<std::int64_t>(group.size());
          found[p].ends.push_back(at);
        }
      }
    });
    std::vector<Part> next;
    for (std::size_t p = 0; p < level.size(); ++p) {
      const Part part = level[p];
      const auto add = [&](std::int32_t point) {
        tree.points.push_back(point);
        tree.begins.push_back(0);
        tree.ends.push_back(0);
      };
      const auto begin = static_cast<std::int32_t>(tree.points.size());
      if (found[p].medoids.empty()) {
        for (std::int64_t i = part.begin; i < part.end; ++i) add(ids[static_cast<std::size_t>(i)]);
      } else {
        std::int64_t from = 0;
        for (std::size_t c = 0; c < found[p].medoids.size(); ++c) {
          add(found[p].medoids[c]);
          const std::int64_t to = found[p].ends[c];
          if (to > from) next.push_back({static_cast<std::int32_t>(tree.points.size()) - 1, part.begin + from, part.begin + to});
          from = to;
        }
      }
      tree.begins[static_cast<std::size_t>(part.node)] = begin;
      tree.ends[static_cast<std::size_t>(part.node)] = static_cast<std::int32_t>(tree.points.size());
    }
    level = next;
  }
  return tree;
}

std::int64_t pick_heads(const std::int32_t* points, const std::int32_t* begins, const std::int32_t* ends, std::int64_t nodes,
                        const HeadRule& rule, std::uint8_t* heads, std::int64_t num_points) {
  std::fill_n(heads, num_points, std::uint8_t{0});
  std::vector<std::int64_t> sizes(static_cast<std::size_t>(nodes));  // 0: claimed by a head
  std::vector<std::pair<std::int64_t, std::int32_t>> children;
  std::int64_t count = 0;
  const auto choose = [&](std::int32_t point) {
    if (point < 0 || heads[point]) return;
    heads[point] = 1;
    ++count;
  };
  for (std::int64_t node = nodes - 1; node >= 0; --node) {  // children stand behind their parents
    std::int64_t size = 1;
    for (std::int32_t child = begins[node]; child < ends[node]; ++child) size += sizes[static_cast<std::size_t>(child)];
    sizes[static_cast<std::size_t>(node)] = size;
    if (size < rule.select) continue;
    choose(points[node]);
    if (size > rule.split) {
      children.clear();
      for (std::int32_t child = begins[node]; child < ends[node]; ++child)
        if (sizes[static_cast<std::size_t>(child)] > 0) children.emplace_back(-sizes[static_cast<std::size_t>(child)], child);
      const auto most = static_cast<std::size_t>((size + rule.factor - 1) / rule.factor);
      const std::size_t chosen = std::min(most, children.size());
      std::partial_sort(children.begin(), children.begin() + static_cast<std::ptrdiff_t>(chosen), children.end());
      for (std::size_t i = 0; i < chosen; ++i) choose(points[children[i].second]);
    }
    sizes[static_cast<std::size_t>(node)] = 0;
  }
  return count;
}

}  // namespace mw
