//! Where a server runs, as guards and incarnations record it: `host:directory#device.inode.birth@boot`.
//!
//! No two kernels share a boot id, and no two directories of one kernel share device and inode. So two servers that run
//! at the same time never share a place. A restart of the machine changes the boot id, and may change the numbers of
//! devices. Then a data directory is recognised by host, path, inode and creation time, which no copy of its files
//! shares. (A clone of the whole disk does, on a machine with the same name: it cannot be distinguished from a machine
//! that was restarted.)

use std::fmt;

/// The identity of a data directory, as its kernel sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// `host:directory`
    path: String,
    device: u64,
    inode: u64,
    /// When the directory was created, in microseconds; `None`: the file system does not record it, or an earlier
    /// version wrote this.
    birth_us: Option<u64>,
    boot: String,
}

/// The relation of two places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Likeness {
    /// The same directory: a server that names both was restarted.
    Same,
    /// The same directory, after the machine was restarted.
    Rebooted,
    Elsewhere,
}

impl Place {
    pub fn new(host: &str, directory: &str, device: u64, inode: u64, birth_us: Option<u64>, boot: &str) -> Self {
        Self {
            path: format!("{host}:{directory}"),
            device,
            inode,
            birth_us,
            boot: boot.to_owned(),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let (rest, boot) = text.rsplit_once('@')?;
        let (path, directory) = rest.rsplit_once('#')?;
        let mut numbers = directory.split('.');
        Some(Self {
            path: path.to_owned(),
            device: numbers.next()?.parse().ok()?,
            inode: numbers.next()?.parse().ok()?,
            birth_us: numbers.next().and_then(|birth| birth.parse().ok()),
            boot: boot.to_owned(),
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}.{}", self.path, self.device, self.inode)?;
        if let Some(birth_us) = self.birth_us {
            write!(f, ".{birth_us}")?;
        }
        write!(f, "@{}", self.boot)
    }
}

/// Compares two places in their text form.
pub fn compare(one: &str, other: &str) -> Likeness {
    if one == other {
        return Likeness::Same;
    }
    let (Some(one), Some(other)) = (Place::parse(one), Place::parse(other)) else {
        return Likeness::Elsewhere;
    };
    let is_same_birth = match (one.birth_us, other.birth_us) {
        (Some(one), Some(other)) => one == other,
        _ => true,
    };
    if one.inode != other.inode || !is_same_birth {
        Likeness::Elsewhere
    } else if one.boot == other.boot {
        match one.device == other.device {
            true => Likeness::Same,
            false => Likeness::Elsewhere,
        }
    } else if one.path == other.path {
        Likeness::Rebooted
    } else {
        Likeness::Elsewhere
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: &str = "db:/data#8.17.1700000000000000@boot1";

    #[test]
    fn places_survive_their_text_form() {
        for text in [HERE, "db:/data#8.17@boot1", "d@b:/a#b#8.17.5@"] {
            assert_eq!(Place::parse(text).expect("it is one").to_string(), text);
        }
        assert_eq!(
            Place::new("db", "/data", 8, 17, Some(1_700_000_000_000_000), "boot1").to_string(),
            HERE
        );
        for text in ["", "here", "db:/data#8@boot1", "db:/data#x.17@boot1"] {
            assert!(Place::parse(text).is_none(), "{text:?}");
        }
    }

    #[test]
    fn a_directory_is_recognised() {
        use Likeness::{Elsewhere, Rebooted, Same};
        for (other, likeness) in [
            (HERE, Same),
            // Written by an earlier version,
            ("db:/data#8.17@boot1", Same),
            // in another container, or with another name.
            ("other:/elsewhere#8.17.1700000000000000@boot1", Same),
            ("db:/data#9.17.1700000000000000@boot2", Rebooted),
            ("db:/data#9.17@boot2", Rebooted),
            // A clone of the file system on the same machine.
            ("db:/data#9.17.1700000000000000@boot1", Elsewhere),
            // A copy in its place: the inode may be used again.
            ("db:/data#8.17.1800000000000000@boot1", Elsewhere),
            ("db:/data#8.17.1800000000000000@boot2", Elsewhere),
            ("db:/data#8.18.1700000000000000@boot2", Elsewhere),
            // A clone of the disk on another machine.
            ("staging:/data#8.17.1700000000000000@boot2", Elsewhere),
            ("db:/mnt/data#8.17.1700000000000000@boot2", Elsewhere),
            ("nowhere", Elsewhere),
        ] {
            assert_eq!(compare(HERE, other), likeness, "{other}");
            assert_eq!(compare(other, HERE), likeness, "{other}");
        }
        assert_eq!(compare("here", "here"), Same);
    }
}
