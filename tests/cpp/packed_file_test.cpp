#include "cpu/packed_file.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace rts::cpu {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kPage = 4096;
constexpr std::size_t kPayloadBytes = 3 * kPage + 100;  // ends within a page, and within a word of the checksum

// A payload that tells who wrote it.
PackedFile::Fill content_of(unsigned seed) {
  return [seed](std::span<std::byte> payload) {
    std::minstd_rand random(seed + 1);
    for (std::byte& byte : payload) byte = static_cast<std::byte>(random() >> 8U);
  };
}

bool holds_content_of(const PackedFile& file, unsigned seed) {
  std::vector<std::byte> expected(kPayloadBytes);
  content_of(seed)(expected);
  return std::ranges::equal(file.bytes(), expected);
}

class PackedFileTest : public testing::Test {
 protected:
  PackedFileTest() {
    std::string pattern = (fs::temp_directory_path() / "packed_file_test.XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("cannot make a temporary folder");
    folder_ = pattern;
    path_ = folder_ / "weights";
  }
  ~PackedFileTest() override { fs::remove_all(folder_); }

  auto create(const PackedFile::Fill& fill = content_of(0)) const {
    return PackedFile::create(path_, key_, kPayloadBytes, fill);
  }
  std::error_code error_of_create(const fs::path& path) const {
    const auto created = PackedFile::create(path, key_, kPayloadBytes, content_of(0));
    const auto* const error = std::get_if<std::error_code>(&created);
    return error != nullptr ? *error : std::error_code();
  }
  std::optional<PackedFile> open() const { return PackedFile::open(path_, key_, kPayloadBytes); }

  void flip(std::size_t offset, unsigned bits = 0xFF) const {
    std::fstream file(path_, std::ios::binary | std::ios::in | std::ios::out);
    file.seekg(static_cast<std::streamoff>(offset));
    const int before = file.get();
    file.seekp(static_cast<std::streamoff>(offset));
    file.put(static_cast<char>(static_cast<unsigned>(before) ^ bits));
  }
  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder_)) names.push_back(entry.path().filename().string());
    std::ranges::sort(names);
    return names;
  }
  void make_old(const fs::path& path) const {
    fs::last_write_time(path, fs::last_write_time(path) - std::chrono::hours(2));
  }

  const PackedKey key_ = PackedKey::of("a source");
  fs::path folder_;
  fs::path path_;
};

bool is_aligned(const PackedFile& file) {
  return reinterpret_cast<std::uintptr_t>(file.bytes().data()) % kPage == 0;
}

TEST_F(PackedFileTest, WhatWasCreatedIsOpened) {
  {
    const auto created = create();
    ASSERT_TRUE(std::holds_alternative<PackedFile>(created));
    EXPECT_TRUE(holds_content_of(std::get<PackedFile>(created), 0));
    EXPECT_TRUE(is_aligned(std::get<PackedFile>(created)));
  }
  const auto opened = open();
  ASSERT_TRUE(opened);
  EXPECT_TRUE(holds_content_of(*opened, 0));
  EXPECT_TRUE(is_aligned(*opened));
  EXPECT_EQ(names(), std::vector<std::string>{"weights"});
}

TEST_F(PackedFileTest, PayloadsOfAllSizes) {
  for (const std::size_t size : {0, 1, 7, 63, 64, 65, 4095, 4096, 4097, 5000000}) {
    ASSERT_TRUE(std::holds_alternative<PackedFile>(PackedFile::create(path_, key_, size, content_of(0)))) << size;
    const auto opened = PackedFile::open(path_, key_, size);
    ASSERT_TRUE(opened) << size;
    EXPECT_EQ(opened->bytes().size(), size);
    EXPECT_FALSE(PackedFile::open(path_, key_, size + 1)) << size;
    EXPECT_EQ(PackedFile::in_memory(size, content_of(0)).bytes().size(), size);
  }
}

TEST_F(PackedFileTest, ThePayloadIsZeroBeforeItIsFilled) {
  bool zero = true;
  const auto check = [&](std::span<std::byte> payload) {
    zero = zero && std::ranges::all_of(payload, [](std::byte byte) { return byte == std::byte{0}; });
  };
  ASSERT_TRUE(std::holds_alternative<PackedFile>(create(check)));
  PackedFile::in_memory(kPayloadBytes, check);
  EXPECT_TRUE(zero);
}

TEST_F(PackedFileTest, TheModeIsWhatTheUmaskLeaves) {
  const mode_t before = ::umask(027);
  const auto created = create();
  ::umask(before);
  struct stat status{};
  ASSERT_EQ(::stat(path_.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777U, 0640U);
}

TEST_F(PackedFileTest, InMemoryHoldsTheSame) {
  const PackedFile packed = PackedFile::in_memory(kPayloadBytes, content_of(0));
  EXPECT_TRUE(holds_content_of(packed, 0));
  EXPECT_TRUE(is_aligned(packed));
  EXPECT_THROW(PackedFile::in_memory(SIZE_MAX / 2, content_of(0)), std::bad_alloc);
}

TEST_F(PackedFileTest, AMovedFileKeepsItsBytes) {
  auto created = create();
  PackedFile moved = std::move(std::get<PackedFile>(created));
  PackedFile assigned = PackedFile::in_memory(1, content_of(0));
  assigned = std::move(moved);
  EXPECT_TRUE(holds_content_of(assigned, 0));
}

TEST_F(PackedFileTest, KeysFollowTheirDescription) {
  EXPECT_EQ(PackedKey::of("a source"), key_);
  EXPECT_NE(PackedKey::of("a sourcf"), key_);
  EXPECT_NE(PackedKey::of(""), key_);
}

TEST_F(PackedFileTest, AnotherKeyOrSizeIsNotOpened) {
  const auto created = create();
  EXPECT_FALSE(PackedFile::open(path_, PackedKey::of("another source"), kPayloadBytes));
  EXPECT_FALSE(PackedFile::open(path_, key_, kPayloadBytes - 1));
  EXPECT_FALSE(PackedFile::open(path_, key_, SIZE_MAX));
}

// With the header, such a size comes to that of a small file.
TEST_F(PackedFileTest, ASizeThatWrapsRoundIsNotOpened) {
  const auto created = create();
  constexpr std::size_t kFileBytes = 200;
  const std::size_t wraps = SIZE_MAX - kPage + 1 + kFileBytes;
  fs::resize_file(path_, kFileBytes);
  std::fstream file(path_, std::ios::binary | std::ios::in | std::ios::out);
  file.seekp(32);
  file.write(reinterpret_cast<const char*>(&wraps), sizeof wraps);
  file.close();
  EXPECT_FALSE(PackedFile::open(path_, key_, wraps));
}

TEST_F(PackedFileTest, WhatIsNoPackedFileIsNotOpened) {
  EXPECT_FALSE(open());
  fs::create_directory(path_);
  EXPECT_FALSE(open());
  fs::remove(path_);
  ASSERT_EQ(::mkfifo(path_.c_str(), 0600), 0);
  EXPECT_FALSE(open());
  fs::remove(path_);
  std::ofstream(path_).flush();
  EXPECT_FALSE(open());
  std::ofstream(path_, std::ios::binary) << std::string(kPage + kPayloadBytes, '\0');
  EXPECT_FALSE(open());
}

TEST_F(PackedFileTest, AChangedHeaderIsNotOpened) {
  const auto created = create();
  constexpr std::size_t kHeaderBytes = 104;
  for (std::size_t offset = 0; offset < kHeaderBytes; ++offset) {
    flip(offset, 0x10);
    EXPECT_FALSE(open()) << offset;
    flip(offset, 0x10);
  }
  EXPECT_TRUE(open());
}

TEST_F(PackedFileTest, AChangedByteIsNotOpened) {
  const auto created = create();
  std::minstd_rand random(1);
  std::vector<std::size_t> offsets = {0, kPayloadBytes - 1};
  for (int i = 0; i < 300; ++i) offsets.push_back(random() % kPayloadBytes);
  for (const std::size_t offset : offsets) {
    const unsigned bits = 1U << random() % 8;
    flip(kPage + offset, bits);
    EXPECT_FALSE(open()) << offset;
    flip(kPage + offset, bits);
  }
  EXPECT_TRUE(open());
}

// The file with two of its pieces exchanged.
TEST_F(PackedFileTest, SwappedBlocksAreNotOpened) {
  for (const std::size_t block : {8UL, 64UL, 512UL, kPage}) {
    const auto created = create();
    std::fstream file(path_, std::ios::binary | std::ios::in | std::ios::out);
    std::vector<char> both(2 * block);
    file.seekg(kPage);
    file.read(both.data(), static_cast<std::streamsize>(both.size()));
    std::ranges::rotate(both, both.begin() + static_cast<std::ptrdiff_t>(block));
    file.seekp(kPage);
    file.write(both.data(), static_cast<std::streamsize>(both.size()));
    file.close();
    EXPECT_FALSE(open()) << block;
  }
}

TEST_F(PackedFileTest, AFileOfAnotherLengthIsNotOpened) {
  const auto created = create();
  const std::size_t whole = kPage + kPayloadBytes;
  for (const std::size_t size : {whole - 1, whole + 1, whole - kPage, whole + kPage, kPage, 104UL, 8UL, 1UL, 0UL}) {
    fs::copy_file(path_, folder_ / "whole", fs::copy_options::overwrite_existing);
    fs::resize_file(path_, size);
    EXPECT_FALSE(open()) << size;
    fs::rename(folder_ / "whole", path_);
  }
  EXPECT_TRUE(open());
}

TEST_F(PackedFileTest, WhatWasOpenedOutlivesTheFile) {
  const auto first = create(content_of(1));
  const auto opened = open();
  const auto second = create(content_of(2));
  ASSERT_TRUE(opened);
  EXPECT_TRUE(holds_content_of(*opened, 1));
  EXPECT_TRUE(holds_content_of(std::get<PackedFile>(first), 1));
  EXPECT_TRUE(holds_content_of(std::get<PackedFile>(second), 2));
  EXPECT_TRUE(holds_content_of(open().value(), 2));
  fs::resize_file(path_, kPage);
  EXPECT_TRUE(holds_content_of(*opened, 1));
  EXPECT_TRUE(holds_content_of(std::get<PackedFile>(second), 2));
}

TEST_F(PackedFileTest, ConcurrentCreatesLeaveOneValidFile) {
  constexpr int kWriters = 4;
  std::vector<pid_t> children;
  for (int child = 0; child < kWriters; ++child) {
    const pid_t pid = ::fork();
    ASSERT_GE(pid, 0);
    if (pid == 0) {
      bool right = true;
      for (unsigned round = 0; round < 20; ++round) {
        const unsigned seed = static_cast<unsigned>(child) * 100 + round;
        const auto created = create(content_of(seed));
        right = right && std::holds_alternative<PackedFile>(created) &&
                holds_content_of(std::get<PackedFile>(created), seed) && open().has_value();
      }
      ::_exit(right ? 0 : 1);
    }
    children.push_back(pid);
  }
  for (const pid_t pid : children) {
    int status = 0;
    ASSERT_EQ(::waitpid(pid, &status, 0), pid);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  EXPECT_TRUE(open());
  EXPECT_EQ(names(), std::vector<std::string>{"weights"});
}

TEST_F(PackedFileTest, ConcurrentCreatesByThreadsLeaveOneValidFile) {
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 4; ++seed) {
    threads.emplace_back([this, seed] {
      for (int round = 0; round < 10; ++round) {
        const auto created = create(content_of(seed));
        ASSERT_TRUE(std::holds_alternative<PackedFile>(created));
        EXPECT_TRUE(holds_content_of(std::get<PackedFile>(created), seed));
        EXPECT_TRUE(open());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(names(), std::vector<std::string>{"weights"});
}

TEST_F(PackedFileTest, AFillThatThrowsLeavesWhatWasThere) {
  const auto throws = [](std::span<std::byte> payload) {
    payload[0] = std::byte{1};
    throw std::runtime_error("thrown by fill");
  };
  EXPECT_THROW(create(throws), std::runtime_error);
  EXPECT_TRUE(names().empty());

  const auto created = create();
  EXPECT_THROW(create(throws), std::runtime_error);
  EXPECT_EQ(names(), std::vector<std::string>{"weights"});
  EXPECT_TRUE(open());

  EXPECT_THROW(PackedFile::in_memory(kPayloadBytes, throws), std::runtime_error);
}

TEST_F(PackedFileTest, AProcessKilledWhileItFillsLeavesNoPackedFile) {
  const auto die = [](std::span<std::byte> payload) {
    content_of(0)(payload);
    ::kill(::getpid(), SIGKILL);
  };
  const pid_t pid = ::fork();
  ASSERT_GE(pid, 0);
  if (pid == 0) {
    [[maybe_unused]] const auto created = create(die);
    ::_exit(0);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(pid, &status, 0), pid);
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_FALSE(open());
  ASSERT_EQ(names().size(), 1U);
  const fs::path left = folder_ / names().front();
  EXPECT_FALSE(PackedFile::open(left, key_, kPayloadBytes));

  // It may be somebody's who is at work.
  {
    const auto created = create();
  }
  EXPECT_TRUE(fs::exists(left));
  make_old(left);
  {
    const auto created = create();
  }
  EXPECT_FALSE(fs::exists(left));
  EXPECT_TRUE(open());
}

TEST_F(PackedFileTest, OnlyAbandonedFilesOfThisTargetAreRemoved) {
  const std::vector<std::string> others = {
      "weights.0123456789abcdef",      "weights.0123456789abcdeg.tmp", "weights.0123456789abcde.tmp",  "weights.tmp",
      "weights2.0123456789abcdef.tmp", "weight.0123456789abcdef.tmp",  "weightsX0123456789abcdef.tmp",
  };
  for (const std::string& name : others) std::ofstream(folder_ / name) << "not ours";
  for (const std::string& name : others) make_old(folder_ / name);
  fs::create_directory(folder_ / "weights.0123456789abcdef.tmp");
  make_old(folder_ / "weights.0123456789abcdef.tmp");

  const auto created = create();
  std::vector<std::string> expected = others;
  expected.insert(expected.end(), {"weights", "weights.0123456789abcdef.tmp"});
  std::ranges::sort(expected);
  EXPECT_EQ(names(), expected);
}

// A path without a folder is one in the working directory.
TEST_F(PackedFileTest, ARelativePath) {
  const fs::path before = fs::current_path();
  fs::current_path(folder_);
  std::ofstream("weights.0123456789abcdef.tmp") << "abandoned";
  make_old("weights.0123456789abcdef.tmp");
  const auto created = PackedFile::create("weights", key_, kPayloadBytes, content_of(0));
  fs::current_path(before);
  EXPECT_TRUE(std::holds_alternative<PackedFile>(created));
  EXPECT_TRUE(open());
  EXPECT_EQ(names(), std::vector<std::string>{"weights"});
}

TEST_F(PackedFileTest, SaysWhyThereCanBeNoFile) {
  EXPECT_EQ(error_of_create(folder_ / "missing" / "weights"), std::errc::no_such_file_or_directory);
  EXPECT_EQ(error_of_create(folder_ / std::string(250, 'n')), std::errc::filename_too_long);
  EXPECT_EQ(error_of_create("/proc/weights"), std::errc::no_such_file_or_directory);

  fs::create_directories(path_ / "not empty");
  EXPECT_EQ(error_of_create(path_), std::errc::is_a_directory);
  EXPECT_EQ(names(), std::vector<std::string>{"weights"});
}

TEST_F(PackedFileTest, AReadOnlyFolderIsAnError) {
  fs::permissions(folder_, static_cast<fs::perms>(0555));
  // Permissions do not bind the superuser: another user tries.
  const pid_t pid = ::fork();
  ASSERT_GE(pid, 0);
  if (pid == 0) {
    constexpr uid_t kNobody = 65534;
    if (::getuid() == 0 && ::setuid(kNobody) != 0) ::_exit(2);
    ::_exit(error_of_create(path_) == std::errc::permission_denied ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(pid, &status, 0), pid);
  fs::permissions(folder_, fs::perms::owner_all);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_TRUE(names().empty());
}

TEST_F(PackedFileTest, TheDiskHasReservedTheRoomThatFillWritesTo) {
  struct stat status{};
  const auto created = create([&](std::span<std::byte>) { ::stat((folder_ / names().front()).c_str(), &status); });
  constexpr std::size_t kBlock = 512;
  EXPECT_GE(static_cast<std::size_t>(status.st_blocks) * kBlock, kPage + kPayloadBytes);
}

// Where there is no room, that shows before the work is done.
TEST_F(PackedFileTest, NoRoomIsAnError) {
  bool filled = false;
  const auto fill = [&](std::span<std::byte>) { filled = true; };
  const auto no_disk_has_this = PackedFile::create(path_, key_, std::size_t{1} << 60U, fill);
  ASSERT_TRUE(std::holds_alternative<std::error_code>(no_disk_has_this));
  EXPECT_TRUE(std::holds_alternative<std::error_code>(PackedFile::create(path_, key_, SIZE_MAX, fill)));

  rlimit before{};
  ::getrlimit(RLIMIT_FSIZE, &before);
  const auto handler = ::signal(SIGXFSZ, SIG_IGN);
  const rlimit limit{2 * kPage, before.rlim_max};
  ::setrlimit(RLIMIT_FSIZE, &limit);
  const std::error_code error = error_of_create(path_);
  ::setrlimit(RLIMIT_FSIZE, &before);
  ::signal(SIGXFSZ, handler);
  EXPECT_EQ(error, std::errc::file_too_large);
  EXPECT_FALSE(filled);
  EXPECT_TRUE(names().empty());
}

}  // namespace
}  // namespace rts::cpu
