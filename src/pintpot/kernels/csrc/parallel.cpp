#include "parallel.h"

#include "pintpot.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace {

using Runtime = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<Runtime> runtime{nullptr};
std::atomic<bool> forked{false};

// Ranges for each thread: more than one, so that a thread that was late takes fewer.
constexpr int64_t kRangesPerThread = 4;

struct Job {
    pintpot::Body body;
    const void* data;
    int64_t items;
    int64_t ranges;
    std::atomic<int64_t> next{0};
};

void work(void* argument) {
    Job& job = *static_cast<Job*>(argument);
    for (int64_t range = job.next++; range < job.ranges; range = job.next++) {
        job.body(job.data, job.items * range / job.ranges, job.items * (range + 1) / job.ranges);
    }
}

}  // namespace

extern "C" void pintpot_use_runtime(void* parallel) {
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { forked = true; }); });
    runtime = reinterpret_cast<Runtime>(parallel);
}

namespace pintpot {

void parallel_for(int64_t items, int64_t threads, Body body, const void* data) {
    threads = std::min(threads, items);
    if (threads <= 1 || forked) {
        if (items > 0) body(data, 0, items);
        return;
    }
    Job job{body, data, items, std::min(items, threads * kRangesPerThread)};
    if (Runtime start = runtime) {
        start(work, &job, static_cast<unsigned>(threads), 0);
        return;
    }
    std::vector<std::thread> started;
    try {
        for (int64_t i = 1; i < threads; ++i) started.emplace_back(work, &job);
    } catch (const std::system_error&) {
        // The system gives no more threads: those that there are do all of it.
    }
    work(&job);
    for (std::thread& thread : started) thread.join();
}

}  // namespace pintpot
