// Work on many units by several threads that end with the call.
#pragma once

#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace distquant {

// Elements that a thread must have to be worth starting: below it, starting takes longer than the work.
constexpr int64_t kWorthAThread = 1 << 17;

// Calls `work(first, last)` on disjoint ranges that cover `[0, units)`, on at most `threads` threads, this one too.
template <class Work>
void in_parallel(int64_t threads, int64_t units, int64_t elements, const Work &work) {
    int64_t parts = elements / kWorthAThread + 1;
    parts = parts < threads ? parts : threads;
    parts = parts < units ? parts : units;
    if (parts <= 1) {
        if (units > 0) work((int64_t)0, units);
        return;
    }
    const auto edge = [=](int64_t part) { return units / parts * part + units % parts * part / parts; };
    std::vector<std::thread> others;
    others.reserve((size_t)parts - 1);
    int64_t started = 1;
    try {
        for (; started < parts; ++started) others.emplace_back(work, edge(started), edge(started + 1));
    } catch (const std::system_error &) {
        // The system gives no more threads: the rest is done here.
    }
    work(edge(0), edge(1));
    if (started < parts) work(edge(started), units);
    for (std::thread &other : others) other.join();
}

}  // namespace distquant
