#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "check.hpp"

std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}
int failures = 0;

// With sanitizers, accesses out of bounds end the process; tests named for them expect that.
#ifdef __SANITIZE_ADDRESS__
constexpr int REPORTED = 99;
#define OPTIONS extern "C" __attribute__((visibility("default"))) const char*
OPTIONS __asan_default_options() { return "exitcode=99:detect_leaks=0"; }
OPTIONS __ubsan_default_options() { return "exitcode=99"; }
static bool dies(const Test& test) { return std::strstr(test.name, "out_of_bounds"); }
#else
constexpr int REPORTED = 0;
static bool dies(const Test&) { return false; }
#endif

static void run_alone(const Test& test) {
    for (const std::string& variable : test.variables) {
        size_t equals = variable.find('=');
        setenv(("MUPSCALE_EMULATED_" + variable.substr(0, equals)).c_str(), variable.c_str() + equals + 1, 1);
    }
    test.run();
    std::fflush(nullptr);
    _exit(failures ? 1 : 0);
}

// Runs all tests, or those whose names hold the argument.
int main(int count, char** arguments) {
    int run = 0, failed = 0;
    for (const Test& test : tests()) {
        if (count > 1 && !std::strstr(test.name, arguments[1])) continue;
        run++;
        std::fflush(nullptr);
        pid_t child = fork();
        if (child == 0) run_alone(test);
        int status = 0;
        waitpid(child, &status, 0);
        if (WIFEXITED(status) && WEXITSTATUS(status) == (dies(test) ? REPORTED : 0)) continue;
        failed++;
        std::printf("%s: failed (status %d)\n", test.name, status);
    }
    std::printf("emulator: %d tests, %d failed\n", run, failed);
    return failed || !run;
}
