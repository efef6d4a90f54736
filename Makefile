# SPDX-License-Identifier: GPL-2.0
#
# For people and CI; the module itself is described in Kbuild, which the kernel's build reads.
# Everything is built below build/.
#
## Building for a kernel of your own
##   make                    build/rnbd.ko for KDIR, by default the running kernel's build tree
##   make modules_install    install it there
##   make install            install the sources for DKMS, which then builds it for each kernel
##                           (dkms install rnbd/VERSION), and what makes "modprobe nbd" load it
##   make uninstall          remove these
##   make rnbdctl-install    build rnbdctl, and install it with its pages, completions and unit
##   make rnbdctl-uninstall  remove these
##   make clean              remove build/
##
## With the workbench: a Debian root, a stock kernel and a virtual machine, made by tools/env
## and kept in a cache (once, about 5 minutes and 3 GB). It installs two packages on this machine
## if they are missing: mmdebstrap and debian-archive-keyring.
##   make demo               boot the stock kernel, load the driver and use it
##   make check              run all tests, or those that match T=pattern
##   make check-debug        the tests in the virtual machine on a kernel with KASAN, lockdep, kmemleak
##                           and others; the first run builds that kernel, in 15 to 25 minutes
##   make check-stacks       RAID, volumes, encryption, multipath, caches and the kernel's targets on top of
##                           devices, in the virtual machine; not part of check
##   make misuse             check that code that misuses kapi does not compile
##   make mutate             put faults into the driver, one at a time: does "make check" find each?
##   make mutants            the same for all that is compiled on this machine, by cargo-mutants
##   make fuzz               look for byte streams that the driver's parser misreads, for SECONDS=60;
##                           the first run builds the debug kernel, too, since that comes with clang
##   make soak HOURS=h       everything at once for h hours, with random faults (h may be a fraction)
##   make shell              a shell in the virtual machine, the driver loaded
##   make stock              build/rnbd.ko for the stock kernel in the cache
##   make rnbdctl            build/rnbdctl, the operators' tool (Documentation/rnbdctl.rst)
##   make kernels            the same for each kernel that KERNEL can name, except debug; the first run
##                           takes another 15 minutes and 4.5 GB
##   make deb                the Debian packages, in build/: rnbd-dkms; rnbd-modules, the module for KERNEL;
##                           rnbd-common, which both need; rnbdctl. The first run makes a small Debian root for it
##   make deb-dkms           only rnbd-dkms and rnbd-common, for which nothing has to be compiled
##   make check-packages     install rnbd-dkms, make its builds fail, boot the result, purge it: in a new
##                           Debian root, 15 minutes and 6 GB; then check-prebuilt
##   make check-prebuilt     the same with the other packages, and with a root file system on a network block
##                           device; 2 GB
##   make bench              rnbd.ko and nbd.ko side by side: cost and speed (QUICK=1: minutes)
##   make htmldocs           the documentation as HTML, in build/htmldocs; the first run makes a small
##                           Debian root for it
##   make lint               the checks that .ci/run makes before it tests; also one by one:
##                           rustfmtcheck clippy rustdoc shellcheck unsafecheck htmldocs
##   make rustfmt            format the sources
##   make distclean          remove build/ and the cache
##
## Variables
##   KDIR=dir                the kernel build tree for "make"
##   DRIVER=nbd              demo, check, check-debug, check-stacks, soak and shell: use the kernel's own driver
##                           instead
##   KERNEL=name             stock, deb, demo, check, soak and shell: use another kernel: debug, that of
##                           check-debug; rt, with PREEMPT_RT; cloud; 7.2; and for stock, check and
##                           shell: arm64
##   KERNELS=name,...        check, kernels: on or for each of these kernels; all: all but debug
##   T=pattern,...           check, check-debug, misuse: only tests whose names contain one of them;
##                           mutate: only such faults; bench: only such cells
##   SEED=number             check, check-debug, soak: repeat the random tests of an earlier run
##   QUICK=1 ROUNDS=n        bench: measure less; measure n rounds
##   MODES="mode ..."        bench: some of cost (instructions for an I/O), wall (speed), scale (many
##                           devices), connect (connecting and disconnecting), remote (instructions
##                           of a machine whose server is another one; not unless it is named)
##   CARD=kind               bench, mode remote: card, plain (no segmentation, checksums and
##                           scatter-gather), lossy
##   SECONDS=n               fuzz: for how long
##   V=1                     show the commands of the build

# The only definition; CHANGELOG.md and the documentation must match it.
VERSION := 0.1.0

ifdef RNBD_INSIDE
# In the workbench's build root.
KDIR := /kernel/build
KARGS := $(shell cat /kernel/make.args) -j$(shell nproc)
else
KDIR ?= /lib/modules/$(shell uname -r)/build
endif

DRIVER ?= rnbd
KERNEL ?= stock
# As in tools/env, which knows debug as well.
stock_kernels := stock rt cloud 7.2 arm64
comma := ,
export DRIVER KERNEL T SEED HOURS V QUICK MODES ROUNDS

builds := $(CURDIR)/build
out := $(builds)$(if $(filter-out stock,$(KERNEL)),/$(KERNEL))
workbench := tools/env exec --
kbuild = $(MAKE) --no-print-directory -C $(KDIR) $(KARGS) M=$(CURDIR)

# refuse,WHY: prints why KDIR cannot be used, and the alternatives.
refuse = { echo "rnbd: KDIR=$(KDIR) $(strip $(1))." >&2; \
	echo 'Set KDIR to a prepared tree, or run "make stock" or "make demo": they make all they need.' >&2; \
	exit 1; }

# Kernel series that the module was built for and run on. It may also build for another one. If it does
# not, the compiler's many errors do not help a user.
series := 7.2 7.3
this_series = $(shell cut -d . -f 1,2 $(KDIR)/include/config/kernel.release)

modules: check-kdir
	@mkdir -p $(out)
	+$(if $(filter $(series),$(this_series)),$(kbuild) MO=$(out)/module modules,\
		@$(kbuild) MO=$(out)/module modules > $(out)/make.log 2>&1 || $(call refuse,is of the series \
			$(this_series) and rnbd does not build for it; it does for $(series). $(out)/make.log \
			has the errors. See Documentation/kernels.rst))
	@cp $(out)/module/rnbd.ko $(out)/rnbd.ko
	@echo "$(out:$(CURDIR)/%=%)/rnbd.ko is for $$(modinfo -F vermagic $(out)/rnbd.ko)"

# What the debug kernel has to find (tools/check).
faults: check-kdir
	@mkdir -p $(out)
	+$(MAKE) --no-print-directory -C $(KDIR) $(KARGS) M=$(CURDIR)/tests/faults MO=$(out)/faults modules
	@cp $(out)/faults/faults.ko $(out)/faults.ko

modules_install: modules
	+$(kbuild) MO=$(out)/module modules_install

# For DKMS, and for the Debian package: what builds the module, and what makes "modprobe nbd" load it.
dkms_source = $(DESTDIR)/usr/src/rnbd-$(VERSION)
install:
	install -d $(dkms_source)/packaging $(addprefix $(DESTDIR)/usr/,sbin lib/modprobe.d share/man/man8)
	cp -r Makefile Kbuild rnbd_trace.c rnbd_trace.h $(wildcard *.rs rnbd_*/) kapi pure $(dkms_source)/
	install packaging/kernel-tree packaging/dkms-build $(dkms_source)/packaging/
	sed 's/#MODULE_VERSION#/$(VERSION)/' packaging/dkms.conf > $(dkms_source)/dkms.conf
	install packaging/rnbd-driver $(DESTDIR)/usr/sbin/
	install -m 644 packaging/rnbd-driver.8 $(DESTDIR)/usr/share/man/man8/
	install -m 644 packaging/modprobe.conf $(DESTDIR)/usr/lib/modprobe.d/rnbd.conf

uninstall:
	rm -rf $(dkms_source)
	rm -f $(DESTDIR)/usr/sbin/rnbd-driver $(DESTDIR)/usr/share/man/man8/rnbd-driver.8 \
		$(DESTDIR)/usr/lib/modprobe.d/rnbd.conf

# The operators' tool. RNBDCTL=file is the program if it was built before, as it was for the Debian package.
# The environment does not count: rnbdctl's users may have a variable of that name.
RNBDCTL :=
sbin := $(DESTDIR)/usr/sbin
share := $(DESTDIR)/usr/share
units := $(DESTDIR)/usr/lib/systemd/system
pages := connect exports list show disconnect resize reconnect handover keep events stats watch
rnbdctl-install:
	$(if $(RNBDCTL),,cargo build --release --manifest-path tools/rnbdctl/Cargo.toml --target-dir build/cargo)
	install -D $(or $(RNBDCTL),build/cargo/release/rnbdctl) $(sbin)/rnbdctl
	install -d $(share)/man/man8
	$(sbin)/rnbdctl man > $(share)/man/man8/rnbdctl.8
	for page in $(pages); do $(sbin)/rnbdctl man $$page > $(share)/man/man8/rnbdctl-$$page.8 || exit; done
	install -D -m 644 packaging/rnbd.toml.5 $(share)/man/man5/rnbd.toml.5
	install -d $(addprefix $(share)/,bash-completion/completions zsh/vendor-completions fish/vendor_completions.d)
	$(sbin)/rnbdctl completion bash > $(share)/bash-completion/completions/rnbdctl
	$(sbin)/rnbdctl completion zsh > $(share)/zsh/vendor-completions/_rnbdctl
	$(sbin)/rnbdctl completion fish > $(share)/fish/vendor_completions.d/rnbdctl.fish
	install -D -m 644 packaging/rnbd@.service $(units)/rnbd@.service

rnbdctl-uninstall:
	rm -f $(sbin)/rnbdctl $(share)/man/man8/rnbdctl.8 $(pages:%=$(share)/man/man8/rnbdctl-%.8) \
		$(share)/man/man5/rnbd.toml.5 $(share)/bash-completion/completions/rnbdctl \
		$(share)/zsh/vendor-completions/_rnbdctl $(share)/fish/vendor_completions.d/rnbdctl.fish \
		$(units)/rnbd@.service

ifneq ($(filter arm64 debug,$(KERNEL)),)
deb:
	@echo 'rnbd: there are no packages for KERNEL=$(KERNEL)' >&2; exit 1
else
deb: stock rnbdctl
	@$(workbench) packaging/crates > build/crates
	@tools/env package -- tools/deb $(VERSION) $(out:$(CURDIR)/%=%)/rnbd.ko
endif

deb-dkms:
	@tools/env package -- tools/deb $(VERSION)

check-packages:
	@tools/check-packages
	@tools/check-prebuilt

check-prebuilt:
	@tools/check-prebuilt

# One message for each thing that such a tree can lack.
check-kdir:
	@test -e $(KDIR)/Makefile || $(call refuse,is no kernel build tree)
	@grep -qs '^CONFIG_RUST=y' $(KDIR)/include/config/auto.conf || \
		$(call refuse,is of a kernel without CONFIG_RUST)
	@test -e $(KDIR)/rust/libkernel.rmeta || $(call refuse,lacks the Rust metadata \
		(rust/libkernel.rmeta); distributions' headers packages do)

chosen_kernels = $(if $(filter all,$(or $(KERNELS),all)),$(stock_kernels),$(subst $(comma), ,$(KERNELS)))
# each,KERNELS,TARGET: goes on where it fails, and says so at the end.
each = @failed=; for kernel in $(1); do echo "=== kernel $$kernel"; \
	$(MAKE) --no-print-directory $(2) KERNELS= KERNEL=$$kernel || failed="$$failed $$kernel"; done; \
	test -z "$$failed" || { echo "Failed:$$failed"; exit 1; }

kernels:
	@# One that cannot be made must not keep the others from being built, and is reported below.
	-@tools/env ensure $(chosen_kernels)
	$(call each,$(chosen_kernels),stock)

stock:
	$(workbench) make --no-print-directory modules

rnbdctl:
	$(workbench) cargo build --locked --release --manifest-path tools/rnbdctl/Cargo.toml --target-dir build/cargo
	@cp build/cargo/release/rnbdctl build/rnbdctl
	@echo build/rnbdctl

ifeq ($(DRIVER),rnbd)
demo shell: stock
vm := tools/vm -f $(out:$(CURDIR)/%=%)/rnbd.ko
else
vm := tools/vm
endif

demo:
	$(vm) -f tools/demo -- env DRIVER=$(DRIVER) /rnbd/demo

shell:
	@echo 'Booting. "exit" ends it; so does Ctrl-A X.'
	@$(vm) -m 4096 -t 86400 -i -w -a quiet -f tools/demo -- env DRIVER=$(DRIVER) /rnbd/demo shell

check:
ifeq ($(KERNELS),)
	$(workbench) tools/check
else
	$(call each,$(chosen_kernels),check)
endif

misuse: stock
	$(workbench) tools/misuse '$(T)'

check-debug: export KERNEL := debug
check-debug:
	$(workbench) tools/check

check-stacks:
	$(workbench) tools/check stacks

fuzz: export KERNEL := debug
fuzz:
	$(workbench) tools/fuzz -max_total_time=$(or $(SECONDS),60)

mutate:
	$(workbench) tools/mutate

mutants:
	$(workbench) tools/mutants

soak:
	$(workbench) tools/soak

bench:
	$(workbench) env CARD='$(CARD)' tools/bench

lint: rustfmtcheck clippy rustdoc shellcheck unsafecheck htmldocs

rustfmt:
	$(workbench) tools/lint rustfmt

rustfmtcheck clippy rustdoc shellcheck unsafecheck:
	$(workbench) tools/lint $@

htmldocs:
	@tools/env docs -- tools/lint $@

clean:
	rm -rf $(builds)

distclean: clean
	tools/env clean

help:
	@sed -n 's/^## \{0,1\}//p' Makefile

.DEFAULT_GOAL := modules
.PHONY: modules faults modules_install install uninstall deb deb-dkms check-packages check-prebuilt check-kdir kernels stock rnbdctl rnbdctl-install rnbdctl-uninstall demo shell check check-debug check-stacks misuse mutate mutants fuzz soak \
	bench lint rustfmt rustfmtcheck clippy rustdoc shellcheck unsafecheck htmldocs clean distclean help
