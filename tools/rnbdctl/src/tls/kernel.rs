// SPDX-License-Identifier: GPL-2.0

//! Hands the keys of a connection to the kernel (`Documentation/networking/tls.rst`).

use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::sockopt::{TcpTlsRx, TcpTlsTx, TcpUlp, TlsCryptoInfo};
use nix::sys::socket::{SetSockOpt, setsockopt};
use rustls::crypto::cipher::Iv;
use rustls::{ConnectionTrafficSecrets, Error, ExtractedSecrets, ProtocolVersion};
use zeroize::Zeroize;

use super::Problem;

/// Bytes of a nonce that do not change, for AES-GCM.
const SALT: usize = 4;

/// Has the kernel encrypt what is sent on a socket, and decrypt what is received.
///
/// # Errors
///
/// The kernel lacks TLS or the cipher, or it is no socket of TCP, or the server has closed the connection.
pub fn install(
    socket: impl AsFd,
    version: Option<ProtocolVersion>,
    secrets: ExtractedSecrets,
) -> io::Result<()> {
    set(&socket, "TCP_ULP", TcpUlp::<[u8; 3]>::default(), b"tls")?;
    let tx = Keys(crypto_info(version, &secrets.tx.1, secrets.tx.0)?);
    let rx = Keys(crypto_info(version, &secrets.rx.1, secrets.rx.0)?);
    set(&socket, "TLS_TX", TcpTlsTx, &tx.0)?;
    set(&socket, "TLS_RX", TcpTlsRx, &rx.0)
}

fn set<O: SetSockOpt>(
    socket: &impl AsFd,
    call: &'static str,
    option: O,
    value: &O::Val,
) -> io::Result<()> {
    setsockopt(socket, option, value).map_err(|errno| refusal(call, errno))
}

/// A connection that the server has closed, or reset, is not the kernel's fault: it takes an open one.
fn refusal(call: &'static str, errno: Errno) -> io::Error {
    match errno {
        Errno::ENOTCONN => io::ErrorKind::UnexpectedEof.into(),
        errno => Problem::Kernel { call, errno }.into(),
    }
}

/// One direction's key, and the number of the next record.
pub(super) fn crypto_info(
    version: Option<ProtocolVersion>,
    secrets: &ConnectionTrafficSecrets,
    number: u64,
) -> Result<TlsCryptoInfo, Problem> {
    let old = match version {
        Some(ProtocolVersion::TLSv1_3) => false,
        Some(ProtocolVersion::TLSv1_2) => true,
        _ => return Err(unusable()),
    };
    let info = |cipher_type| libc::tls_crypto_info {
        version: match old {
            false => libc::TLS_1_3_VERSION,
            true => libc::TLS_1_2_VERSION,
        },
        cipher_type,
    };
    let rec_seq = number.to_be_bytes();
    Ok(match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv } => {
            let (salt, iv) = split(iv, old)?;
            TlsCryptoInfo::Aes128Gcm(libc::tls12_crypto_info_aes_gcm_128 {
                info: info(libc::TLS_CIPHER_AES_GCM_128),
                iv,
                key: array(key.as_ref())?,
                salt,
                rec_seq,
            })
        }
        ConnectionTrafficSecrets::Aes256Gcm { key, iv } => {
            let (salt, iv) = split(iv, old)?;
            TlsCryptoInfo::Aes256Gcm(libc::tls12_crypto_info_aes_gcm_256 {
                info: info(libc::TLS_CIPHER_AES_GCM_256),
                iv,
                key: array(key.as_ref())?,
                salt,
                rec_seq,
            })
        }
        ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
            TlsCryptoInfo::Chacha20Poly1305(libc::tls12_crypto_info_chacha20_poly1305 {
                info: info(libc::TLS_CIPHER_CHACHA20_POLY1305),
                iv: array(iv.as_ref())?,
                key: array(key.as_ref())?,
                salt: [],
                rec_seq,
            })
        }
        _ => return Err(unusable()),
    })
}

/// The nonce of AES-GCM: the part that does not change, and the kernel's first one of the other.
///
/// With TLS 1.2 each record brings the latter, and nothing but its sender chooses it; no two may be equal.
/// rustls takes its first value with the record's number added bit by bit (XOR). The kernel would count
/// from that value on, and so repeat those of the records that were sent here. It begins at the other half
/// of all values.
fn split(iv: &Iv, old: bool) -> Result<([u8; SALT], [u8; 8]), Problem> {
    let (salt, rest) = iv.as_ref().split_first_chunk().ok_or_else(unusable)?;
    let mut rest: [u8; 8] = array(rest)?;
    if old {
        rest[0] ^= 0x80;
    }
    Ok((*salt, rest))
}

fn array<const N: usize>(bytes: &[u8]) -> Result<[u8; N], Problem> {
    bytes.try_into().map_err(|_| unusable())
}

/// Nothing but TLS 1.2 and 1.3 with the ciphers above is offered.
fn unusable() -> Problem {
    Problem::Tls(Error::General(
        "the kernel does not have this cipher".into(),
    ))
}

/// What the kernel is given of one direction. It does not stay in memory for longer than it takes; but where it
/// was moved while it was put together, copies may stay until the stack is used again.
struct Keys(TlsCryptoInfo);

impl Drop for Keys {
    fn drop(&mut self) {
        match &mut self.0 {
            TlsCryptoInfo::Aes128Gcm(info) => {
                info.key.zeroize();
                info.salt.zeroize();
                info.iv.zeroize();
            }
            TlsCryptoInfo::Aes256Gcm(info) => {
                info.key.zeroize();
                info.salt.zeroize();
                info.iv.zeroize();
            }
            TlsCryptoInfo::Chacha20Poly1305(info) => {
                info.key.zeroize();
                info.iv.zeroize();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::crypto::cipher::AeadKey;

    #[test]
    fn a_connection_that_is_closed_is_no_fault_of_the_kernel() {
        let error = refusal("TCP_ULP", Errno::ENOTCONN);
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let error = refusal("TLS_RX", Errno::EINVAL);
        let problem = error.downcast::<Problem>().unwrap();
        let right = matches!(
            problem,
            Problem::Kernel {
                call: "TLS_RX",
                errno: Errno::EINVAL
            }
        );
        assert!(right, "{problem:?}");
    }

    /// What the kernel is told of a key, a nonce and the number of the next record.
    #[test]
    fn keys_as_the_kernel_takes_them() {
        let (new, old) = (ProtocolVersion::TLSv1_3, ProtocolVersion::TLSv1_2);
        let iv = || Iv::new([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
        let key = || AeadKey::from([7; 32]);
        let gcm = ConnectionTrafficSecrets::Aes256Gcm {
            key: key(),
            iv: iv(),
        };
        match crypto_info(Some(new), &gcm, 0x0102).unwrap() {
            TlsCryptoInfo::Aes256Gcm(info) => {
                assert_eq!((info.info.version, info.info.cipher_type), (0x0304, 52));
                assert_eq!(info.salt, [0, 1, 2, 3]);
                assert_eq!(info.iv, [4, 5, 6, 7, 8, 9, 10, 11]);
                assert_eq!(info.key, [7; 32]);
                assert_eq!(info.rec_seq, [0, 0, 0, 0, 0, 0, 1, 2]);
            }
            other => panic!("{other:?}"),
        }
        // No nonce of a record that was sent here is used again.
        match crypto_info(Some(old), &gcm, 3).unwrap() {
            TlsCryptoInfo::Aes256Gcm(info) => {
                assert_eq!(info.info.version, 0x0303);
                let first = u64::from_be_bytes([4, 5, 6, 7, 8, 9, 10, 11]);
                let kernels = u64::from_be_bytes(info.iv);
                for number in 0..3 {
                    assert!((first ^ number).wrapping_sub(kernels) > u64::MAX / 4);
                }
            }
            other => panic!("{other:?}"),
        }
        let chacha = ConnectionTrafficSecrets::Chacha20Poly1305 {
            key: key(),
            iv: iv(),
        };
        for version in [new, old] {
            match crypto_info(Some(version), &chacha, 1).unwrap() {
                TlsCryptoInfo::Chacha20Poly1305(info) => {
                    assert_eq!(info.info.cipher_type, 54);
                    assert_eq!(info.iv, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(crypto_info(None, &chacha, 0).is_err());
    }
}
