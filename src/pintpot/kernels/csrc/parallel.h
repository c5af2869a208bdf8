// Work shared by threads.
//
// The threads are those of the OpenMP runtime that torch itself uses: Python finds its `GOMP_parallel` in the libraries
// that torch has loaded and hands the address over. A second pool (one of our own, or a second OpenMP runtime linked
// here) would wake up while torch's threads still spin after their last operation, and both would lose. Where there is
// no such runtime, threads are started for each call; that is only done for calls long enough to bear it.
//
// A forked child has a copy of the runtime without its threads, and would wait for them for ever. There, all work is
// done by the calling thread. Data-loader workers ask for one thread and never get here.
//
// What is computed never depends on the number of threads: each item is computed as a whole by one of them.
#pragma once

#include <cstdint>

namespace pintpot {

using Body = void (*)(const void* data, int64_t begin, int64_t end);

// Calls `body` for ranges that together cover 0 to `items`, on at most `threads` threads.
void parallel_for(int64_t items, int64_t threads, Body body, const void* data);

template <typename Function>
void parallel_for(int64_t items, int64_t threads, const Function& function) {
    parallel_for(
        items, threads,
        [](const void* data, int64_t begin, int64_t end) { (*static_cast<const Function*>(data))(begin, end); },
        &function);
}

}  // namespace pintpot
