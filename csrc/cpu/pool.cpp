#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace penstock {
namespace {

// What a member does before it sleeps: about 100 microseconds, longer than the way from one kernel to the next.
constexpr int SPINS = 4000;

void pause_briefly() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Denormal numbers are zeros, in operands and results: some instructions know no others.
class NoDenormals {
public:
#if defined(__x86_64__)
    NoDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~NoDenormals() { _mm_setcsr(before_); }

private:
    unsigned before_;
#elif defined(__aarch64__)
    NoDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" ::"r"(before_ | (1ull << 24)));
    }
    ~NoDenormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

private:
    uint64_t before_;
#endif
};

using Work = std::function<void(int64_t, int)>;

class Team {
public:
    explicit Team(int count) : wanted_(count), shares_((size_t)count) {
        for (int thread = 1; thread < count; thread++) {
            try {
                members_.emplace_back([this, thread] { serve(thread); });
            } catch (const std::system_error&) {  // the system has no more: fewer do the same work
                break;
            }
        }
    }

    ~Team() {
        {
            std::lock_guard lock(sleep_);
            ended_ = true;
            round_++;
        }
        wake_.notify_all();
        for (auto& member : members_) member.join();
    }

    int wanted() const { return wanted_; }
    int64_t count() const { return (int64_t)shares_.size(); }

    void run(int64_t items, const Work& work, bool dealt) {
        work_ = &work;
        for (int64_t thread = 0; thread < count(); thread++) {
            Share& share = shares_[(size_t)thread];
            share.first = dealt ? thread : items * thread / count();
            share.step = dealt ? count() : 1;
            share.items = dealt ? (items - thread + count() - 1) / count() : items * (thread + 1) / count() - share.first;
            share.taken.store(0, std::memory_order_relaxed);
        }
        failure_ = nullptr;
        if (members_.empty() || items < 2) {
            take_items(0);
            return give_up_if_failed();
        }
        gate_.fetch_or(OPEN, std::memory_order_release);
        {
            std::lock_guard lock(sleep_);
            round_.fetch_add(1, std::memory_order_release);
        }
        if (asleep_.load()) wake_.notify_all();
        take_items(0);
        // Who has not come by now is not waited for: its processor may be somebody else's.
        gate_.fetch_and(~OPEN, std::memory_order_relaxed);
        while (gate_.load(std::memory_order_acquire)) pause_briefly();
        give_up_if_failed();
    }

private:
    void give_up_if_failed() {
        if (failure_) std::rethrow_exception(failure_);
    }

    static constexpr uint32_t OPEN = 1u << 31;

    bool enter() {
        uint32_t gate = gate_.load(std::memory_order_relaxed);
        while (gate & OPEN) {
            if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acquire)) return true;
        }
        return false;
    }

    void serve(int thread) {
        uint64_t seen = 0;
        for (;;) {
            for (int i = 0; i < SPINS && round_.load(std::memory_order_acquire) == seen; i++) pause_briefly();
            if (round_.load(std::memory_order_acquire) == seen) {
                std::unique_lock lock(sleep_);
                asleep_++;
                wake_.wait(lock, [&] { return round_.load() != seen; });
                asleep_--;
            }
            seen = round_.load(std::memory_order_acquire);
            if (ended_) return;
            if (!enter()) continue;
            take_items(thread);
            gate_.fetch_sub(1, std::memory_order_release);
        }
    }

    // Its own share in order, and then what others have left.
    void take_items(int thread) {
        NoDenormals guard;
        try {
            for (size_t i = 0; i < shares_.size(); i++) {
                Share& share = shares_[((size_t)thread + i) % shares_.size()];
                while (share.taken.load(std::memory_order_relaxed) < share.items) {
                    int64_t number = share.taken.fetch_add(1, std::memory_order_relaxed);
                    if (number < share.items) (*work_)(share.first + number * share.step, thread);
                }
            }
        } catch (...) {  // no memory, or no such id; the caller is told when all are out
            for (auto& share : shares_) share.taken.store(share.items, std::memory_order_relaxed);
            std::lock_guard lock(sleep_);
            failure_ = std::current_exception();
        }
    }

    struct alignas(64) Share {
        std::atomic<int64_t> taken{0};
        int64_t items = 0, first = 0, step = 1;
    };

    int wanted_;
    std::vector<Share> shares_;
    std::vector<std::thread> members_;
    const Work* work_ = nullptr;
    alignas(64) std::atomic<uint32_t> gate_{0};  // OPEN while a call runs, and how many members are inside
    alignas(64) std::atomic<uint64_t> round_{0};
    std::atomic<int> asleep_{0};
    std::mutex sleep_;
    std::condition_variable wake_;
    std::atomic<bool> ended_{false};  // read by who comes late for a round, too
    std::exception_ptr failure_;
};

std::mutex* turn = new std::mutex;  // like the team never destroyed: the interpreter outlives static objects
std::atomic<int> wanted{1};
Team* team = nullptr;

// A forked child has the team without its threads, and perhaps a turn that a thread of the parent had taken.
void start_anew() {
    turn = new std::mutex;
    team = nullptr;
}

}  // namespace

void set_threads(int count) { wanted = count < 1 ? 1 : count; }
int threads() { return wanted; }

void parallel(int64_t items, const Work& work, bool dealt) {
    static const int registered = pthread_atfork(nullptr, nullptr, start_anew);
    (void)registered;
    std::lock_guard lock(*turn);
    int count = wanted;
    if (team && team->wanted() != count) {
        delete team;
        team = nullptr;
    }
    if (!team) team = new Team(count);
    team->run(items, work, dealt);
}

}  // namespace penstock
